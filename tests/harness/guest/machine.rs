//! One QEMU process: built from a spec, booted under TCG, driven over the agent's line, killed when dropped.
//! Not here: what runs inside; what the drives are (the caller passes QEMU arguments for those).

use super::channel::{Channel, Job};
use super::image::{Image, Overlay, program};
use super::proto::Outcome;
use super::proto::PORT;
use super::target::dying_with_us;
use super::wait::{Deadline, wait_for};
use super::{At, GuestError, Result, cache_dir};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

/// A cold boot takes 3 to 6 s when the cores are free; they may be shared.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// Where QEMU's monitor listens.
const MONITOR: &str = "monitor.sock";

/// What to boot and with which devices.
#[derive(Debug)]
pub struct MachineSpec<'a> {
    /// Names the directory that keeps serial log and QEMU's complaints.
    pub name: &'a str,
    pub image: &'a Image,
    pub overlay: &'a Overlay,
    pub memory_mib: u32,
    pub cpus: u32,
    /// Reserve this many 2 MiB hugepages at boot.
    pub hugepages: u32,
    /// User networking: the host's loopback appears as 10.0.2.2.
    pub network: bool,
    /// More QEMU arguments: drives and controllers.
    pub devices: Vec<String>,
}

impl<'a> MachineSpec<'a> {
    /// One core and what memory a Linux with nothing but its initiators needs; no network, no drives.
    pub fn small(name: &'a str, image: &'a Image, overlay: &'a Overlay) -> Self {
        MachineSpec { name, image, overlay, memory_mib: 768, cpus: 1, hugepages: 0, network: false, devices: Vec::new() }
    }
}

/// A running guest.
pub struct Machine {
    qemu: Child,
    channel: Channel,
    logs: PathBuf,
    scratch: tempfile::TempDir,
}

impl Machine {
    /// Boots and waits for the agent.
    pub fn boot(spec: &MachineSpec<'_>) -> Result<Self> {
        let mut deadline = Deadline::after(BOOT_LIMIT);
        let scratch = tempfile::tempdir().at("create a directory in", &std::env::temp_dir())?;
        let logs = cache_dir().join("guest-logs").join(spec.name);
        std::fs::create_dir_all(&logs).at("create", &logs)?;
        let initrd = scratch.path().join("initrd");
        spec.image.assemble(spec.overlay, &initrd)?;
        let line = scratch.path().join("agent.sock");
        let listener = UnixListener::bind(&line).at("listen on", &line)?;
        listener.set_nonblocking(true).at("listen on", &line)?;

        let complaints = logs.join("qemu.err");
        let errors = std::fs::File::create(&complaints).at("create", &complaints)?;
        let mut qemu = dying_with_us(&program("qemu-system-x86_64")?)
            .args(arguments(spec, &initrd, &line, &logs))
            .args(["-monitor", &format!("unix:{},server=on,wait=off", scratch.path().join(MONITOR).display())])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .map_err(|e| GuestError::failed("starting QEMU", e.to_string()))?;

        let connected = wait_for("QEMU to open the agent's line", deadline.left(), || match listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => match qemu.try_wait() {
                Ok(Some(status)) => Err(GuestError::failed(
                    format!("QEMU ended at once with {status}"),
                    std::fs::read_to_string(&complaints).unwrap_or_default(),
                )),
                _ => Ok(None),
            },
            Err(e) => Err(GuestError::failed("accepting the agent's line", e.to_string())),
        });
        let channel = connected.and_then(|stream| {
            stream.set_nonblocking(false).at("use", &line)?;
            Channel::new(stream).at("use", &line)
        });
        let channel = match channel {
            Ok(channel) => channel,
            Err(error) => {
                end(&mut qemu);
                return Err(error);
            }
        };
        let machine = Machine { qemu, channel, logs, scratch };
        machine.channel.hello(deadline).map_err(|e| machine.with_serial(e))?;
        Ok(machine)
    }

    /// Runs `script` to its end, whatever that is.
    pub fn run(&mut self, script: &str, limit: Duration) -> Result<Outcome> {
        let job = self.start(script, limit)?;
        self.finish(job)
    }

    /// Runs `script` and answers its output; any status but 0 is an error with both streams in it.
    pub fn shell(&mut self, script: &str, limit: Duration) -> Result<String> {
        let outcome = self.run(script, limit)?;
        self.expect_success(script, outcome)
    }

    pub fn start(&mut self, script: &str, limit: Duration) -> Result<Job> {
        self.channel.start(script, limit).map_err(|e| self.with_serial(e))
    }

    pub fn finish(&self, job: Job) -> Result<Outcome> {
        self.channel.finish(job).map_err(|e| self.with_serial(e))
    }

    pub fn ended(&self, job: &Job) -> bool {
        self.channel.ended(job)
    }

    pub fn expect_success(&self, what: &str, outcome: Outcome) -> Result<String> {
        match outcome.status {
            Some(0) => Ok(outcome.out),
            status => Err(self.with_serial(GuestError::failed(
                format!("in the guest, `{}`", what.trim()),
                match status {
                    Some(code) => format!("exit status {code}\n{}{}", outcome.out, outcome.err),
                    None => format!("killed at its time limit\n{}{}", outcome.out, outcome.err),
                },
            ))),
        }
    }

    /// Asks a file of sysfs or procfs, trimmed.
    pub fn read(&mut self, path: &str) -> Result<String> {
        Ok(self.shell(&format!("cat {path}"), Duration::from_secs(20))?.trim().to_owned())
    }

    /// Polls `script` until it succeeds.
    pub fn until(&mut self, what: &str, script: &str, limit: Duration) -> Result<String> {
        let mut deadline = Deadline::after(limit);
        loop {
            let outcome = self.run(script, Duration::from_secs(20))?;
            if outcome.status == Some(0) {
                return Ok(outcome.out);
            }
            if deadline.passed() {
                return Err(self.with_serial(deadline.timeout(what, format!(": {}{}", outcome.out, outcome.err))));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Turns the guest off in order; QEMU closes its drives and exits.
    pub fn power_off(mut self) -> Result<()> {
        let job = self.channel.start("sync; poweroff -f", Duration::from_secs(30))?;
        drop(self.channel.finish(job)); // the answer seldom gets out before the power is gone
        let qemu = &mut self.qemu;
        let ended = wait_for("QEMU to exit after power-off", Duration::from_secs(60), || {
            qemu.try_wait().map_err(|e| GuestError::failed("waiting for QEMU", e.to_string()))
        })?;
        if ended.success() { Ok(()) } else { Err(self.with_serial(GuestError::failed("QEMU", format!("exited with {ended}")))) }
    }

    /// Pulls the plug: SIGKILL to QEMU, nothing is closed or flushed.
    pub fn cut_power(mut self) {
        end(&mut self.qemu);
    }

    /// QEMU's process id, for watching its memory or pausing it.
    pub fn pid(&self) -> u32 {
        self.qemu.id()
    }

    /// The guest kernel's messages so far.
    pub fn serial(&self) -> String {
        std::fs::read(self.logs.join("serial.log")).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    }

    fn with_serial(&self, error: GuestError) -> GuestError {
        let serial = self.serial();
        let lines: Vec<&str> = serial.lines().collect();
        let tail = lines[lines.len().saturating_sub(25)..].join("\n");
        let complaints = std::fs::read_to_string(self.logs.join("qemu.err")).unwrap_or_default();
        let (place, network) = (self.logs.display(), self.network());
        GuestError::failed(
            error.to_string(),
            format!("\n--- end of {place}/serial.log ---\n{tail}\n--- QEMU said ---\n{complaints}{network}"),
        )
    }

    /// What QEMU says of the guest's network and of each connection that goes through it; nothing where it does not answer.
    fn network(&self) -> String {
        let ask = || -> std::io::Result<String> {
            let mut line = UnixStream::connect(self.scratch.path().join(MONITOR))?;
            line.set_read_timeout(Some(Duration::from_secs(1)))?;
            line.write_all(b"info network\ninfo usernet\n")?;
            let (mut said, mut part) = (Vec::new(), [0; 4096]);
            while said.len() < 1 << 16 {
                match line.read(&mut part) {
                    Ok(got @ 1..) => said.extend(&part[..got]),
                    Ok(0) | Err(_) => break, // it says no more
                }
            }
            Ok(String::from_utf8_lossy(&said).into_owned())
        };
        ask().unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        end(&mut self.qemu);
    }
}

fn end(qemu: &mut Child) {
    let _ = qemu.kill(); // it may have ended by itself
    let _ = qemu.wait();
}

fn arguments(spec: &MachineSpec<'_>, initrd: &Path, line: &Path, logs: &Path) -> Vec<String> {
    let memory = spec.memory_mib;
    let mut append = "console=ttyS0 panic=-1 random.trust_cpu=on mitigations=off".to_owned();
    if spec.hugepages > 0 {
        append.push_str(&format!(" hugepagesz=2M hugepages={}", spec.hugepages));
    }
    let mut args: Vec<String> = [
        "-nodefaults",
        "-no-user-config",
        "-no-reboot", // a guest panic ends QEMU
        "-display",
        "none",
        "-accel",
        "tcg",
        "-cpu",
        "max",
    ]
    .map(str::to_owned)
    .to_vec();
    let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
    // shared memory, so that a vhost-user target may map the guest
    add("-machine", "q35,memory-backend=ram".into());
    add("-object", format!("memory-backend-memfd,id=ram,size={memory}M,share=on"));
    add("-m", format!("{memory}M"));
    add("-smp", spec.cpus.to_string());
    add("-kernel", spec.image.kernel.vmlinuz.display().to_string());
    add("-initrd", initrd.display().to_string());
    add("-append", append);
    add("-serial", format!("file:{}", logs.join("serial.log").display()));
    add("-device", "virtio-rng-pci".into());
    add("-device", "virtio-serial-pci".into());
    add("-chardev", format!("socket,id=agent,path={}", line.display()));
    add("-device", format!("virtserialport,chardev=agent,name={PORT}"));
    if spec.network {
        add("-netdev", "user,id=net".into());
        // With mergeable buffers QEMU before 9.1 may wait for ever for a notice that the guest has given new ones (its pull request 267): once the
        // whole network stood still, though nothing shows that it was this.
        add("-device", "virtio-net-pci,netdev=net,romfile=,mrg_rxbuf=off".into());
    }
    args.extend(spec.devices.iter().cloned());
    args
}
