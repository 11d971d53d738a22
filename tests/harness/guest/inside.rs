//! Route (c) as one piece: a storage target inside a guest, on QEMU's NVMe controller over a recording drive; the guest's
//! own initiator writes marked blocks through it; the plug is pulled; what remains is the log.
//! Not here: judging; a volume that maps onto its drive one to one and one that must be recovered are judged differently.

use super::image::{ImageSpec, Overlay};
use super::logged_drive::{JOURNAL_DEVICE, LoggedDrive, NVME_ADDRESS, bind_uio};
use super::machine::{Machine, MachineSpec};
use super::penstock_target::{add_drive, create_volume, export, flags, wait_for_door, wait_for_node};
use super::rpc::GuestLine;
use super::scenario::connect_nvmf;
use super::spdk_target::spdk_dir;
use super::target::{Door, DoorKind};
use super::{At, Result};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;

const LOOPBACK: &str = "127.0.0.1";
const PORT: u16 = 4420;
const RUN: &str = "/run/penstock";

/// What serves the volume inside the guest.
#[derive(Debug, Clone)]
pub enum Inside {
    /// SPDK's target, the NVMe namespace as it is. Unless told so, SPDK answers FLUSH without sending it to the drive.
    SpdkTarget { enable_flush: bool },
    /// penstockd at this path with these further flags, on one drive, with one volume of as many bytes.
    Penstockd { program: PathBuf, flags: Vec<String>, volume: u64 },
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
}

impl Marks {
    pub fn acks(&self) -> u64 {
        self.threads * self.writes_per_thread
    }

    fn script(&self, device: &str) -> String {
        let Marks { blocks, threads, writes_per_thread, seed, sync } = self;
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
    let spec = MachineSpec {
        name,
        image: &image,
        overlay: &overlay,
        memory_mib: 2048,
        cpus: 2,
        hugepages: 384,
        network: false,
        devices: drive.devices(),
    };
    let mut machine = Machine::boot(&spec)?;
    bind_uio(&mut machine)?;
    let door = serve(&mut machine, inside)?;
    let device = connect_nvmf(&mut machine, &door, LOOPBACK)?;
    machine.shell(&marks.script(&device), Duration::from_secs(300))?;
    machine.cut_power();
    Ok(drive)
}

/// Starts the target in the guest; it stays behind as a child of init.
fn serve(machine: &mut Machine, inside: &Inside) -> Result<Door> {
    let limit = Duration::from_secs(90);
    let start = |machine: &mut Machine, command: String| {
        machine.shell(&format!("mkdir -p {RUN}; {command} > /run/target.log 2>&1 &"), limit).map(drop)
    };
    match inside {
        Inside::SpdkTarget { .. } => {
            start(machine, format!("nvmf_tgt -m 0x1 -s 512 -c /etc/inside.json -r {RUN}/spdk.sock"))?;
            let listening = format!(
                "agent call {RUN}/spdk.sock nvmf_get_subsystems '{{}}' | grep -q '\"trsvcid\":\"{PORT}\"' || {{ tail -3 /run/target.log; false; }}"
            );
            machine.until("SPDK's target to listen in the guest", &listening, limit)?;
            Ok(Door::NvmfTcp { port: PORT, nqn: SPDK_NQN.into() })
        }
        Inside::Penstockd { volume, flags: further, .. } => {
            start(machine, format!("penstockd {} --mem-mib 512 {}", flags(RUN).join(" "), further.join(" ")))?;
            let socket = format!("{RUN}/run/penstockd.sock");
            let mut line = GuestLine { machine, socket: &socket };
            let served = wait_for_node(&mut line, limit)
                .and_then(|()| add_drive(&mut line, &format!("nvme:{NVME_ADDRESS}"), false))
                .and_then(|()| create_volume(&mut line, *volume))
                .and_then(|()| export(&mut line, DoorKind::NvmfTcp, PORT))
                .and_then(|()| wait_for_door(&mut line, limit));
            served.map_err(|e| {
                let log = machine.run("tail -30 /run/target.log", limit).map(|o| o.out).unwrap_or_default();
                super::GuestError::failed(e.to_string(), format!("\n--- penstockd in the guest said ---\n{log}"))
            })
        }
    }
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
        {"method": "nvmf_subsystem_add_ns", "params": {"nqn": SPDK_NQN, "namespace": {"nsid": 1, "bdev_name": "driven1"}}},
        {"method": "nvmf_subsystem_add_listener", "params": {"nqn": SPDK_NQN, "listen_address":
            {"trtype": "TCP", "adrfam": "IPv4", "traddr": LOOPBACK, "trsvcid": PORT.to_string()}}},
    ]});
    json!({"subsystems": [nvme, nvmf]}).to_string()
}
