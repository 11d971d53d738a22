//! What a guest does with a volume while its target is killed and started again: a file system on it, fio writing and
//! verifying, then a check that everything is clean. The same for both front doors, and for one path or several.
//! Not here: how long anything takes, and what the target is.

use super::channel::Job;
use super::image::{ImageSpec, Overlay};
use super::machine::{Machine, MachineSpec};
use super::target::{Door, Identity, Target};
use super::{GuestError, Result};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

const SHORT: Duration = Duration::from_secs(60);

/// How much fio writes and how often the target dies meanwhile.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub file_mib: u32,
    /// Keeps fio busy long enough for the kills whatever the speed of emulation.
    pub writes_per_second: u32,
    pub depth: u32,
    pub kills: u32,
}

impl Load {
    pub const SMOKE: Load = Load { file_mib: 24, writes_per_second: 700, depth: 8, kills: 1 };
    pub const FULL: Load = Load { file_mib: 192, writes_per_second: 900, depth: 16, kills: 6 };
    /// Slow: between kills a node has to come back and catch up.
    pub const MULTIPATH: Load = Load { file_mib: 96, writes_per_second: 400, depth: 16, kills: 10 };
}

/// What was seen, for the test's output.
#[derive(Debug)]
pub struct Report {
    pub kills: u32,
    pub fio_writes: u64,
    pub fio_reads: u64,
    /// Longest time that one read or write took: about one outage, if the kill hit I/O under way.
    pub slowest_ms: f64,
}

/// The host's loopback as a guest sees it through QEMU's user networking.
pub const HOST: &str = "10.0.2.2";

/// Connects the guest's own nvme-tcp initiator to the target at `address`, over each of its doors; answers the block device's name.
pub fn connect_nvmf(machine: &mut Machine, doors: &[Door], address: &str) -> Result<String> {
    let [Door::NvmfTcp { nqn, .. }, ..] = doors else { return Err(GuestError::failed("connecting", "not an NVMe/TCP door")) };
    let ports = doors.iter().filter_map(|door| if let Door::NvmfTcp { port, .. } = door { Some(port) } else { None });
    for port in ports {
        let options = format!(
            "transport=tcp,traddr={address},trsvcid={port},nqn={nqn},hostnqn=nqn.2014-08.org.nvmexpress:uuid:\
             7f1d9a52-0a51-4d0e-9a7f-0d6f5b0d7c11,hostid=7f1d9a52-0a51-4d0e-9a7f-0d6f5b0d7c11,\
             nr_io_queues=1,queue_size=64,reconnect_delay=1,ctrl_loss_tmo={LOSS_SECONDS},keep_alive_tmo=5"
        );
        machine.shell(&format!("printf '%s' '{options}' > /dev/nvme-fabrics"), SHORT)?;
    }
    let find = format!(
        "for s in /sys/class/nvme-subsystem/*; do [ \"$(cat $s/subsysnqn)\" != {nqn} ] || ls $s; done | grep -x 'nvme[0-9]*n1' | \
         while read d; do [ ! -b /dev/$d ] || echo $d; done | grep nvme"
    );
    Ok(machine.until("the namespace to appear", &find, SHORT)?.trim().to_owned())
}

/// For so long the guest's kernel goes on trying to reach a path that is gone.
const LOSS_SECONDS: u32 = 300;

/// Waits until the guest's kernel is connected over as many paths again.
fn paths_are_back(machine: &mut Machine, paths: usize) -> Result<()> {
    let live = format!("cd /sys/class/nvme && grep . nvme*/state && [ $(cat nvme*/state | grep -cx live) = {paths} ]");
    machine.until(&format!("{paths} paths to be live"), &live, 2 * SHORT).map(drop)
}

/// QEMU arguments of a virtio-blk device behind a vhost-user socket; the guest sees it as vda.
pub fn vhost_devices(door: &Door) -> Result<Vec<String>> {
    let Door::VhostUserBlk { socket } = door else { return Err(GuestError::failed("connecting", "not a vhost-user door")) };
    let chardev = format!("socket,id=volume,path={},reconnect=1", socket.display());
    Ok(["-chardev", &chardev, "-device", "vhost-user-blk-pci,chardev=volume,num-queues=1"].map(str::to_owned).to_vec())
}

/// Compares what the guest's kernel shows of the device with what the target is meant to say.
pub fn check_identity(machine: &mut Machine, device: &str, expected: Identity) -> Result<()> {
    let queue = format!("/sys/block/{device}/queue");
    let number = |text: String| text.parse::<u64>().map_err(|e| GuestError::failed("a number from sysfs", format!("{text:?}: {e}")));
    let found = Identity {
        write_cache: if machine.read(&format!("{queue}/write_cache"))? == "write through" { "write through" } else { "write back" },
        logical_block_size: number(machine.read(&format!("{queue}/logical_block_size"))?)? as u32,
        discard: number(machine.read(&format!("{queue}/discard_max_bytes"))?)? > 0,
        write_zeroes: number(machine.read(&format!("{queue}/write_zeroes_max_bytes"))?)? > 0,
    };
    if found == expected {
        Ok(())
    } else {
        Err(GuestError::failed(format!("identity of {device}"), format!("found {found:?}, expected {expected:?}")))
    }
}

/// Boots a guest and connects it to `doors`; answers it and the block device's name. `name` is for logs, `agent` the agent's program.
pub fn guest_at(doors: &[Door], name: &str, agent: &Path) -> Result<(Machine, String)> {
    let image = ImageSpec::storage_host()?.build()?;
    let overlay = Overlay::with_agent(agent)?;
    let plain = MachineSpec::small(name, &image, &overlay);
    match doors {
        [door @ Door::VhostUserBlk { .. }] => {
            let machine = Machine::boot(&MachineSpec { devices: vhost_devices(door)?, ..plain })?;
            Ok((machine, "vda".to_owned()))
        }
        doors => {
            let mut machine = Machine::boot(&MachineSpec { network: true, ..plain })?;
            let device = connect_nvmf(&mut machine, doors, HOST)?;
            Ok((machine, device))
        }
    }
}

/// Boots a guest at the doors of `target`, which is started for it, and lets [`filesystem_survives_kills`] run there.
pub fn target_killed_under_a_guest(name: &str, agent: &Path, target: &mut dyn Target, load: Load) -> Result<Report> {
    target.start()?;
    let (mut machine, device) = guest_at(&target.doors(), name, agent)?;
    check_identity(&mut machine, &device, target.identity())?;
    let report = filesystem_survives_kills(&mut machine, target, &device, load)?;
    machine.power_off()?;
    Ok(report)
}

/// [`target_killed_under_a_guest`] as a test has it: it has to go well, and what was seen is printed.
pub fn kill_under_load(name: &str, agent: &str, target: &mut dyn Target, load: Load) {
    println!("{:?}", target_killed_under_a_guest(name, Path::new(agent), target, load).unwrap());
}

/// mkfs, mount, fio with verify while the target dies and comes back, unmount, fsck; any I/O error fails it.
pub fn filesystem_survives_kills(machine: &mut Machine, target: &mut dyn Target, device: &str, load: Load) -> Result<Report> {
    machine.shell(&format!("mkfs.ext4 -q -F /dev/{device} && mount -t ext4 /dev/{device} /mnt"), SHORT)?;
    let seconds = u64::from(load.file_mib) * 256 / u64::from(load.writes_per_second);
    // Only a bound: emulation among others that want the cores has been seen to take ten times what fio is asked for, and two minutes.
    let limit = Duration::from_secs(600 + 20 * seconds);
    let same = format!(
        "cd /mnt && fio --name=kill --filename=/mnt/data --rw=randwrite --bs=4k --size={}m --direct=1 --ioengine=libaio \
         --iodepth={} --verify=crc32c --verify_fatal=1 --randseed=1 --output-format=json --output=/tmp/fio.json",
        load.file_mib, load.depth
    );
    let fio = format!("{same} --do_verify=1 --verify_backlog=512 --rate_iops={} --end_fsync=1", load.writes_per_second);
    let before = written_blocks(machine, device)?;
    let job = machine.start(&fio, limit)?;
    for kill in 1..=load.kills {
        // evenly over the file, and never after its end
        let mark = u64::from(load.file_mib) * 256 * u64::from(kill) / u64::from(load.kills + 1);
        written_blocks_reach(machine, target, device, &job, before + mark)?;
        target.kill()?;
        if machine.ended(&job) {
            return Err(GuestError::failed(format!("kill {kill}"), "fio had ended already: nothing was under way"));
        }
        target.start()?;
        match target.doors().len() {
            1 => {} // the next kill may come while the guest reconnects
            paths => paths_are_back(machine, paths)?,
        }
    }
    let outcome = machine.finish(job)?;
    let fio_said = machine.run("cat /tmp/fio.json", SHORT)?.out;
    machine.expect_success(&fio, outcome)?;
    let report = read_fio(&fio_said, load)?;

    machine.shell("umount /mnt", SHORT)?;
    machine.shell(&format!("e2fsck -f -n /dev/{device}"), SHORT)?;
    // once more from the volume alone, with nothing of the file left in the guest's memory
    let again = format!("mount -t ext4 /dev/{device} /mnt && {same} --verify_only=1 && cd / && umount /mnt");
    machine.shell(&again, limit)?;
    target.audit()?;
    if target.identity().discard {
        discarded_blocks_read_as_zeros(machine, device)?;
    }
    no_errors_logged(machine)?;
    Ok(report)
}

/// fstrim after `/data` of an ext4 was deleted is accepted, and the device reads as zeros after a discard of all of it.
pub fn discarded_blocks_read_as_zeros(machine: &mut Machine, device: &str) -> Result<()> {
    machine.shell(&format!("mount -t ext4 /dev/{device} /mnt && rm /mnt/data && sync && fstrim /mnt && umount /mnt"), SHORT)?;
    machine.shell(&format!("e2fsck -f -n /dev/{device}"), SHORT)?;
    let zeros = format!("blkdiscard /dev/{device} && dd if=/dev/{device} bs=1M count=64 iflag=direct 2>/dev/null | tr -d '\\0' | wc -c");
    let others = machine.shell(&zeros, SHORT)?;
    if others.trim() == "0" {
        Ok(())
    } else {
        Err(GuestError::failed(format!("{device} after a discard"), format!("{} bytes of 64 MiB are not zero", others.trim())))
    }
}

/// How many 4 KiB blocks the device has taken since boot.
fn written_blocks(machine: &mut Machine, device: &str) -> Result<u64> {
    // a multipath head counts nothing in kernels before 6.5; its hidden path devices do
    let controller = device.strip_suffix("n1").unwrap_or(device);
    let files = format!("/sys/block/{device}/stat /sys/block/{controller}c*n1/stat");
    let sectors = machine.shell(&format!("cat {files} 2>/dev/null | awk '{{s += $7}} END {{print s}}'"), SHORT)?;
    let sectors: u64 = sectors.trim().parse().map_err(|e| GuestError::failed(files, format!("{sectors:?}: {e}")))?;
    Ok(sectors / 8)
}

/// Waits until the device has taken `blocks` in all; an error if the job ends before.
fn written_blocks_reach(machine: &mut Machine, target: &mut dyn Target, device: &str, job: &Job, blocks: u64) -> Result<()> {
    super::wait::wait_for(&format!("{blocks} blocks to be written"), Duration::from_secs(300), || {
        target.attend()?;
        if machine.ended(job) {
            return Err(GuestError::failed("waiting to kill the target", "fio ended before"));
        }
        Ok((written_blocks(machine, device)? >= blocks).then_some(()))
    })
}

fn read_fio(text: &str, load: Load) -> Result<Report> {
    let wrong = |why: &str| GuestError::failed("fio's report", format!("{why}\n{text}"));
    // fio may put warnings before the JSON
    let json = text.find('{').map(|at| &text[at..]).ok_or_else(|| wrong("no JSON"))?;
    let report: Value = serde_json::from_str(json).map_err(|e| wrong(&e.to_string()))?;
    let job = &report["jobs"][0];
    let number = |path: &str| job.pointer(path).and_then(Value::as_f64).ok_or_else(|| wrong(&format!("no {path}")));
    if number("/error")? != 0.0 {
        return Err(wrong("an error"));
    }
    let (writes, reads) = (number("/write/total_ios")? as u64, number("/read/total_ios")? as u64);
    let expected = u64::from(load.file_mib) * 256;
    if writes != expected || reads < expected {
        return Err(wrong(&format!("{writes} writes and {reads} verifying reads; {expected} of each were expected")));
    }
    let slowest_ms = number("/write/clat_ns/max")?.max(number("/read/clat_ns/max")?) / 1e6;
    Ok(Report { kills: load.kills, fio_writes: writes, fio_reads: reads, slowest_ms })
}

/// The guest kernel's log holds nothing about failed I/O or a damaged file system.
pub fn no_errors_logged(machine: &mut Machine) -> Result<()> {
    let pattern = "I/O error|Buffer I/O|lost (async|sync) page write|EXT4-fs (error|warning)|critical .* error|blocked for more than|Aborting journal";
    let outcome = machine.run(&format!("dmesg | grep -iE '{pattern}'"), SHORT)?;
    match outcome.status {
        Some(1) => Ok(()),
        _ => Err(GuestError::failed("the guest kernel's log", outcome.out)),
    }
}
