//! Route (c) as one piece: a storage target inside a guest, on QEMU's NVMe controller over a recording drive; the guest's
//! own initiator writes marked blocks through it; the plug is pulled; what remains is the log.
//! Not here: judging; a volume that maps onto its drive one to one and one that must be recovered are judged differently.

use super::channel::Job;
use super::image::{ImageSpec, Overlay};
use super::logged_drive::{JOURNAL_DEVICE, LoggedDrive, NVME_ADDRESS, bind_uio};
use super::machine::{Machine, MachineSpec};
use super::penstock_target::{add_drive, create_volume, export, flags, wait_for_door, wait_for_node};
use super::rpc::GuestLine;
use super::scenario::connect_nvmf;
use super::spdk_target::{UUID, spdk_dir};
use super::target::{Door, DoorKind};
use super::wait::wait_for;
use super::{At, GuestError, Result};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;

const LOOPBACK: &str = "127.0.0.1";
const PORT: u16 = 4420;
const RUN: &str = "/run/penstock";
const START_LIMIT: Duration = Duration::from_secs(90);

/// What serves the volume inside the guest.
#[derive(Debug, Clone)]
pub enum Inside {
    /// SPDK's target, the NVMe namespace as it is. Unless told so, SPDK answers FLUSH without sending it to the drive.
    SpdkTarget { enable_flush: bool },
    /// penstockd at this path with these further flags, on one drive, with one volume of as many bytes.
    Penstockd { program: PathBuf, flags: Vec<String>, reach: Reach, volume: u64 },
}

/// How penstockd in the guest gets at the recording drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// SPDK's NVMe driver through uio.
    Uio,
    /// The guest kernel's block device, through io_uring.
    Kernel,
    /// The same, and the kernel was told that the drive has no volatile cache: then nobody's barrier reaches it.
    KernelWithoutBarriers,
}

impl Inside {
    fn reach(&self) -> Reach {
        match self {
            Inside::SpdkTarget { .. } => Reach::Uio,
            Inside::Penstockd { reach, .. } => *reach,
        }
    }
}

/// The marked workload; see `tests/guest/writer.rs`.
#[derive(Debug, Clone, Copy)]
pub struct Marks {
    pub blocks: u64,
    pub threads: u64,
    pub writes_per_thread: u64,
    pub seed: u64,
    /// fdatasync after each write, for volumes that state a volatile cache.
    pub sync: bool,
    /// How often the target is killed and started again meanwhile, so that its recovery is in the log, too.
    pub kills: u64,
}

impl Marks {
    pub fn acks(&self) -> u64 {
        self.threads * self.writes_per_thread
    }

    fn script(&self, device: &str) -> String {
        let Marks { blocks, threads, writes_per_thread, seed, sync, .. } = self;
        let promise = if *sync { "sync" } else { "nosync" };
        format!("writer /dev/{device} {JOURNAL_DEVICE} {blocks} {threads} {writes_per_thread} {seed} {promise}")
    }
}

/// Programs of the test that run in the guest.
#[derive(Debug, Clone, Copy)]
pub struct GuestPrograms<'a> {
    pub agent: &'a Path,
    pub writer: &'a Path,
}

/// Serves a volume inside a guest, writes marks to it, pulls the plug. `name` is for logs; files go to `dir`.
pub fn record(name: &str, programs: GuestPrograms<'_>, inside: &Inside, drive_size: u64, marks: Marks, dir: &Path) -> Result<LoggedDrive> {
    let image = ImageSpec::data_plane()?.build()?;
    let mut overlay = Overlay::with_agent(programs.agent)?;
    overlay.program(programs.writer, "writer")?;
    match inside {
        Inside::SpdkTarget { enable_flush } => {
            overlay.program(&spdk_dir()?.join("build/bin/nvmf_tgt"), "nvmf_tgt")?;
            let config = dir.join("inside.json");
            std::fs::write(&config, spdk_config(*enable_flush)).at("write", &config)?;
            overlay.file(&config, "etc/inside.json");
        }
        Inside::Penstockd { program, .. } => overlay.program(program, "penstockd")?,
    }
    let drive = LoggedDrive::create(dir, drive_size)?;
    let small = MachineSpec::small(name, &image, &overlay);
    let spec = MachineSpec { memory_mib: 2048, cpus: 2, hugepages: 384, devices: drive.devices(), ..small };
    let mut machine = Machine::boot(&spec)?;
    match inside.reach() {
        Reach::Uio => bind_uio(&mut machine)?,
        Reach::Kernel => {}
        Reach::KernelWithoutBarriers => {
            machine.shell("echo 'write through' > /sys/block/nvme0n1/queue/write_cache", Duration::from_secs(10))?;
        }
    }
    let door = serve(&mut machine, inside)?;
    let device = connect_nvmf(&mut machine, std::slice::from_ref(&door), LOOPBACK)?;
    let script = marks.script(&device);
    let job = machine.start(&script, Duration::from_secs(300))?;
    for kill in 1..=marks.kills {
        acks_reach(&mut machine, &job, marks.acks() * kill / (marks.kills + 1))?;
        machine.shell(&format!("kill -9 $(cat {RUN}/pid)"), Duration::from_secs(10))?;
        start(&mut machine, inside)?;
        wait_for_service(&mut machine, inside)?;
    }
    let outcome = machine.finish(job)?;
    machine.expect_success(&script, outcome)?;
    machine.cut_power();
    Ok(drive)
}

/// Waits until the writer has journaled `records` acknowledgements.
fn acks_reach(machine: &mut Machine, job: &Job, records: u64) -> Result<()> {
    wait_for(&format!("{records} acknowledgements"), Duration::from_secs(240), || {
        if machine.ended(job) {
            return Err(GuestError::failed("waiting to kill the target", "the writer ended before"));
        }
        let stat = machine.read("/sys/block/vda/stat")?;
        let written: u64 = stat.split_whitespace().nth(4).and_then(|n| n.parse().ok()).unwrap_or(0);
        Ok((written >= records).then_some(()))
    })
}

/// Starts the target in the guest; it stays behind as a child of init.
fn start(machine: &mut Machine, inside: &Inside) -> Result<()> {
    let command = match inside {
        // a killed SPDK leaves its hugepages behind in files; penstockd must not
        Inside::SpdkTarget { .. } => {
            format!("rm -f /dev/hugepages/*; nvmf_tgt -m 0x1 -s 512 -c /etc/inside.json -r {RUN}/spdk.sock")
        }
        Inside::Penstockd { flags: further, reach, .. } => {
            // SPDK sleeps on an NVMe drive by way of vfio's MSI-X alone, which uio has not
            let poll = if *reach == Reach::Uio { "busy" } else { "adaptive" };
            format!("penstockd {} --mem-mib 512 {}", flags(RUN, poll).join(" "), further.join(" "))
        }
    };
    let script = format!("mkdir -p {RUN}; {command} >> /run/target.log 2>&1 & echo $! > {RUN}/pid");
    machine.shell(&script, START_LIMIT).map(drop)
}

/// Waits until the target serves its volume.
fn wait_for_service(machine: &mut Machine, inside: &Inside) -> Result<Door> {
    match inside {
        Inside::SpdkTarget { .. } => {
            let ask = format!("agent call {RUN}/spdk.sock nvmf_get_subsystems '{{}}'");
            let listening = format!("{ask} | grep -q '\"trsvcid\":\"{PORT}\"' || {{ tail -3 /run/target.log; false; }}");
            machine.until("SPDK's target to listen in the guest", &listening, START_LIMIT)?;
            Ok(Door::NvmfTcp { port: PORT, nqn: SPDK_NQN.into() })
        }
        Inside::Penstockd { .. } => {
            let socket = penstockd_socket();
            let mut line = GuestLine { machine, socket: &socket };
            let door = wait_for_node(&mut line, START_LIMIT).and_then(|()| wait_for_door(&mut line, START_LIMIT));
            door.map_err(|e| with_log(machine, e))
        }
    }
}

/// Starts the target for the first time, with all that a blank drive needs.
fn serve(machine: &mut Machine, inside: &Inside) -> Result<Door> {
    start(machine, inside)?;
    if let Inside::Penstockd { volume, reach, .. } = inside {
        let drive = match reach {
            Reach::Uio => format!("nvme:{NVME_ADDRESS}"),
            Reach::Kernel | Reach::KernelWithoutBarriers => "block:/dev/nvme0n1".to_owned(),
        };
        let socket = penstockd_socket();
        let mut line = GuestLine { machine, socket: &socket };
        let created = wait_for_node(&mut line, START_LIMIT)
            .and_then(|()| add_drive(&mut line, &drive, false))
            .and_then(|()| create_volume(&mut line, *volume))
            .and_then(|()| export(&mut line, DoorKind::NvmfTcp, PORT));
        created.map_err(|e| with_log(machine, e))?;
    }
    wait_for_service(machine, inside)
}

fn penstockd_socket() -> String {
    format!("{RUN}/run/penstockd.sock")
}

fn with_log(machine: &mut Machine, error: GuestError) -> GuestError {
    let log = machine.run("tail -30 /run/target.log", START_LIMIT).map(|o| o.out).unwrap_or_default();
    GuestError::failed(error.to_string(), format!("\n--- the target in the guest said ---\n{log}"))
}

const SPDK_NQN: &str = "nqn.2026-11.io.penstock.test:inside";

fn spdk_config(enable_flush: bool) -> String {
    let nvme = json!({"subsystem": "bdev", "config": [
        {"method": "bdev_nvme_set_options", "params": {"enable_flush": enable_flush}},
        {"method": "bdev_nvme_attach_controller", "params": {"name": "drive", "trtype": "PCIe", "traddr": NVME_ADDRESS}},
    ]});
    let nvmf = json!({"subsystem": "nvmf", "config": [
        {"method": "nvmf_create_transport", "params": {"trtype": "TCP", "num_shared_buffers": 255}},
        {"method": "nvmf_create_subsystem", "params": {"nqn": SPDK_NQN, "allow_any_host": true, "serial_number": "HARNESS"}},
        {"method": "nvmf_subsystem_add_ns", "params": {"nqn": SPDK_NQN, "namespace":
            {"nsid": 1, "bdev_name": "driven1", "uuid": UUID, "nguid": UUID.replace('-', "")}}},
        {"method": "nvmf_subsystem_add_listener", "params": {"nqn": SPDK_NQN, "listen_address":
            {"trtype": "TCP", "adrfam": "IPv4", "traddr": LOOPBACK, "trsvcid": PORT.to_string()}}},
    ]});
    json!({"subsystems": [nvme, nvmf]}).to_string()
}
