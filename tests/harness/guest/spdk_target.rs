//! SPDK's own `nvmf_tgt` or `vhost` over a file, as the target of a scenario. It shows that the harness, the guest and the routes
//! work without anything of ours. Not here: claims about durability; a file survives kill -9 in the page cache.

use super::target::{Daemon, Door, DoorKind, Identity, Target, free_port};
use super::wait::wait_for;
use super::{At, GuestError, Result, cache_dir, rpc};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

const NQN: &str = "nqn.2026-11.io.penstock.test:volume";
pub(super) const UUID: &str = "2f8c7a4e-6f0d-4b7b-9d59-3a1a6f0c9b11"; // fixed: Linux drops a namespace that comes back with another

pub struct SpdkTarget {
    daemon: Daemon,
    door: Door,
    rpc: PathBuf,
    dir: PathBuf,
}

/// Where SPDK was built: `$SPDK_DIR`, else the cache.
pub fn spdk_dir() -> Result<PathBuf> {
    let dir = match std::env::var_os("SPDK_DIR") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => cache_dir().join("spdk"),
    };
    if dir.join("build/bin/nvmf_tgt").is_file() {
        Ok(dir)
    } else {
        Err(GuestError::Missing {
            what: format!("build/bin/nvmf_tgt in {}", dir.display()),
            remedy: "run make spdk, or set SPDK_DIR".into(),
        })
    }
}

impl SpdkTarget {
    /// Files, sockets and log go to `dir`. Does not start.
    pub fn new(dir: &Path, kind: DoorKind, size: u64) -> Result<Self> {
        let dir = dir.canonicalize().at("look at", dir)?;
        let volume = dir.join("volume.img");
        std::fs::File::create(&volume).and_then(|f| f.set_len(size)).at("create", &volume)?;
        let door = match kind {
            DoorKind::NvmfTcp => Door::NvmfTcp { port: free_port()?, nqn: NQN.into() },
            DoorKind::VhostUserBlk => Door::VhostUserBlk { socket: dir.join("volume.vhost") },
        };
        let config = dir.join("spdk.json");
        std::fs::write(&config, configuration(&volume, &door).to_string()).at("write", &config)?;
        let rpc = dir.join("spdk.sock");
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let mut arguments = words("--no-huge -s 512 -m 0x1 --disable-cpumask-locks --no-pci --interrupt-mode");
        if kind == DoorKind::VhostUserBlk {
            arguments.extend(["-S".into(), dir.display().to_string()]);
        }
        arguments.extend(["-c".into(), config.display().to_string(), "-r".into(), rpc.display().to_string()]);
        // not spdk_tgt: it has iSCSI too, whose pools do not fit into 512 MiB
        let program = match kind {
            DoorKind::NvmfTcp => "nvmf_tgt",
            DoorKind::VhostUserBlk => "vhost",
        };
        let daemon = Daemon::new(spdk_dir()?.join("build/bin").join(program), arguments, dir.join("spdk.log"));
        Ok(SpdkTarget { daemon, door, rpc, dir })
    }
}

fn configuration(volume: &Path, door: &Door) -> Value {
    let bdev = json!({"method": "bdev_aio_create", "params": {"name": "volume", "filename": volume, "block_size": 512, "uuid": UUID}});
    let served = match door {
        Door::NvmfTcp { port, nqn } => json!({"subsystem": "nvmf", "config": [
            {"method": "nvmf_create_transport", "params": {"trtype": "TCP"}},
            {"method": "nvmf_create_subsystem", "params": {"nqn": nqn, "allow_any_host": true, "serial_number": "HARNESS"}},
            {"method": "nvmf_subsystem_add_ns", "params": {"nqn": nqn, "namespace": {"nsid": 1, "bdev_name": "volume", "uuid": UUID, "nguid": UUID.replace('-', "")}}},
            {"method": "nvmf_subsystem_add_listener", "params": {"nqn": nqn, "listen_address":
                {"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port.to_string()}}},
        ]}),
        Door::VhostUserBlk { .. } => json!({"subsystem": "vhost_blk", "config": [
            {"method": "vhost_create_blk_controller", "params": {"ctrlr": "volume.vhost", "dev_name": "volume"}},
        ]}),
    };
    json!({"subsystems": [{"subsystem": "bdev", "config": [bdev]}, served]})
}

impl Target for SpdkTarget {
    fn start(&mut self) -> Result<()> {
        if let Door::VhostUserBlk { socket } = &self.door {
            let _ = std::fs::remove_file(socket); // absent at the first start
        }
        let _ = std::fs::remove_file(&self.rpc);
        self.daemon.start()?;
        let (daemon, rpc, door) = (&mut self.daemon, &self.rpc, &self.door);
        let method = match door {
            Door::NvmfTcp { .. } => "nvmf_get_subsystems",
            Door::VhostUserBlk { .. } => "vhost_get_controllers",
        };
        let wanted = match door {
            Door::NvmfTcp { nqn, .. } => nqn.clone(),
            Door::VhostUserBlk { .. } => "volume.vhost".to_owned(),
        };
        let opened = wait_for("SPDK's target to open its door", Duration::from_secs(60), || {
            daemon.expect_alive()?;
            let answer = rpc::call_json(rpc, method, json!({}), Duration::from_secs(5));
            Ok(answer.ok().filter(|a| a.to_string().contains(&wanted)))
        });
        opened.map(drop).map_err(|e| GuestError::failed(e.to_string(), format!("\n{}", self.daemon.last_words())))
    }

    fn kill(&mut self) -> Result<()> {
        self.daemon.kill()
    }

    fn door(&self) -> Door {
        self.door.clone()
    }

    fn identity(&self) -> Identity {
        let write_cache = match self.door {
            Door::NvmfTcp { .. } => "write back", // SPDK's target states a volatile cache whatever the bdev says
            Door::VhostUserBlk { .. } => "write back",
        };
        Identity { write_cache, logical_block_size: 512, discard: false, write_zeroes: true }
    }
}

impl SpdkTarget {
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}
