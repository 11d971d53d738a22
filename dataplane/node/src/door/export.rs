//! Opening and closing the doors of a volume at run time. App thread; each step of SPDK's ends in a closure.
//!
//! NVMe doors: device, subsystem (passthrough), namespace, listener, start. Closing takes the same steps back, and waits for what
//! hosts have outstanding. A step that fails takes back what was done before it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use penstock_api::rpc::{ControllerRange, Door};
use penstock_api::{Nqn, VolumeId};
use spdk_rs::module::{DeviceParams, FrontEnd, Registered};
use spdk_rs::nvmf::{AnaState, Listen, NamespaceOptions, SubsystemOptions, Transport, TransportOptions};
use spdk_rs::{Errno, vhost};

use super::ExportDevice;
use crate::core::{CoreIndex, VolumeSlot};

/// A volume, as far as a door must know it.
#[derive(Clone, Debug)]
pub struct VolumeFace {
    pub id: VolumeId,
    pub name: String,
    pub logical_block: u32,
    /// In logical blocks.
    pub blocks: u64,
    pub home: CoreIndex,
    pub slot: VolumeSlot,
    /// Of a volume of several replicas: whether it is served here, and not by another node.
    pub serves: Option<bool>,
    /// NVMe controller ids that this node may give.
    pub controllers: ControllerRange,
}

/// Every controller id that NVMe has.
pub const ALL_CONTROLLERS: ControllerRange = ControllerRange { first: 1, last: 0xffef };

#[derive(Clone, Debug, thiserror::Error)]
pub enum ExportError {
    #[error("{doing} failed: {errno}. {hint}")]
    Spdk { doing: &'static str, errno: Errno, hint: &'static str },
    #[error("cannot make the directory {}: {why}", path.display())]
    Directory { path: PathBuf, why: String },
    #[error("the volume's name makes no NQN: {0}. Give one with nqn=")]
    Nqn(penstock_api::name::NqnError),
}

fn spdk(doing: &'static str, hint: &'static str) -> impl FnOnce(Errno) -> ExportError {
    move |errno| ExportError::Spdk { doing, errno, hint }
}

/// How an open door is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    pub address: String,
    pub nqn: Option<Nqn>,
}

enum Kind {
    /// `listen` once the address counts this door as a user.
    Nvme {
        nqn: Nqn,
        listen: Option<Listen>,
    },
    Vhost {
        controller: String,
    },
    Local,
}

/// An open door.
pub struct Export {
    device: Arc<ExportDevice>,
    registered: Registered,
    kind: Kind,
    pub opened: Opened,
}

/// Most bytes that one command may carry over NVMe-oF (MDTS): one batch of the oplog.
const IO_BYTES_MAX: u32 = 1 << 20;
/// Logical blocks that a compare-and-write may have.
const COMPARE_BLOCKS: u16 = 1;

/// SPDK's target and the run dir's places for sockets. App thread.
pub struct Target {
    pub(super) nvmf: spdk_rs::nvmf::Target,
    vfio_user_dir: PathBuf,
    vhost_dir: PathBuf,
    /// How many doors, or settings, use an address.
    listening: RefCell<BTreeMap<String, (Listen, u32)>>,
    devices: Cell<u64>,
    gate: Gate,
    /// What subsystems with several paths show, by NQN.
    pub(super) paths: RefCell<BTreeMap<String, super::ana::Path>>,
}

/// Holds back listeners while the doors of the last run are being opened. SPDK loses a CONNECT that arrives while its subsystem is
/// being started (nvmf.c, nvmf_poll_group_add_subsystem frees it unanswered), and after a restart hosts are knocking already.
#[derive(Default)]
struct Gate {
    open: Cell<bool>,
    asked: Cell<bool>,
    /// Subsystems that have been made and have not started.
    starting: Cell<u32>,
    waiting: RefCell<Vec<WhenOpen>>,
}

type WhenOpen = Box<dyn FnOnce(&Rc<Target>)>;
type Done<T> = Box<dyn FnOnce(Result<T, ExportError>)>;

impl Target {
    /// Makes the transports, then calls `done`.
    pub fn open(vhost_dir: PathBuf, vfio_user_dir: PathBuf, done: impl FnOnce(Result<Rc<Self>, ExportError>) + 'static) {
        let nvmf = match spdk_rs::nvmf::Target::get() {
            Ok(nvmf) => nvmf,
            Err(errno) => return done(Err(spdk("finding SPDK's NVMe-oF target", "It is part of SPDK's build: run `make spdk`")(errno))),
        };
        let hook = spdk_rs::nvmf::set_identify_hook(|identify| match identify {
            spdk_rs::nvmf::Identify::Controller { association, data } => super::identify::controller(data, association.host_id != [0; 16]),
            spdk_rs::nvmf::Identify::Namespace { association, data, .. } => {
                super::identify::namespace(data, association.host_id != [0; 16])
            }
        });
        if let Err(errno) = hook {
            return done(Err(spdk("setting the Identify hook", "Report this: it is set once a process")(errno)));
        }
        if let Err(errno) = vhost::set_socket_directory(&format!("{}/", vhost_dir.display())) {
            return done(Err(spdk("setting vhost's directory", "Check the run directory's path")(errno)));
        }
        let (listening, devices, gate, paths) = (RefCell::default(), Cell::new(0), Gate::default(), RefCell::default());
        let target = Rc::new(Self { nvmf, vfio_user_dir, vhost_dir, listening, devices, gate, paths });
        let tcp = TransportOptions {
            io_unit_size: 128 * 1024,
            max_io_size: IO_BYTES_MAX,
            in_capsule_data_size: 8192,
            mask_copy: true,
            ..Default::default()
        };
        let vfio = TransportOptions {
            max_io_size: IO_BYTES_MAX,
            mask_copy: true,
            unmapped_doorbells: spdk_rs::thread::interrupt_mode(),
            ..Default::default()
        };
        nvmf.add_transport(Transport::Tcp, &tcp, move |result| {
            if let Err(errno) = result {
                return done(Err(spdk("making the TCP transport", "More memory may be needed: raise --mem-mib")(errno)));
            }
            nvmf.add_transport(Transport::VfioUser, &vfio, move |result| match result {
                Ok(()) => done(Ok(target)),
                Err(errno) => done(Err(spdk("making the vfio-user transport", "More memory may be needed: raise --mem-mib")(errno))),
            });
        });
    }

    /// Listens on an address, or counts one more user of it.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub fn listen(&self, listen: &Listen) -> Result<(), ExportError> {
        let key = format!("{listen:?}");
        if let Some((_, users)) = self.listening.borrow_mut().get_mut(&key) {
            *users += 1;
            return Ok(());
        }
        self.nvmf.listen(listen).map_err(spdk("listening", "Is the address this machine's, and the port free?"))?;
        self.listening.borrow_mut().insert(key, (listen.clone(), 1));
        Ok(())
    }

    fn unlisten(&self, listen: &Listen) {
        let key = format!("{listen:?}");
        let last = {
            let mut listening = self.listening.borrow_mut();
            match listening.get_mut(&key) {
                Some((_, users)) if *users > 1 => {
                    *users -= 1;
                    false
                }
                Some(_) => listening.remove(&key).is_some(),
                None => false,
            }
        };
        if last && let Err(errno) = self.nvmf.stop_listening(listen) {
            tracing::warn!(?listen, %errno, "an address stays open");
        }
    }

    fn register(&self, face: &VolumeFace, front_end: FrontEnd) -> Result<(Registered, Arc<ExportDevice>), ExportError> {
        let number = self.devices.get();
        self.devices.set(number + 1);
        let forwards = face.serves.is_some() && matches!(front_end, FrontEnd::NvmfVfioUser | FrontEnd::Other);
        let device = Arc::new(ExportDevice::new(face.home, face.slot, face.logical_block, face.blocks, forwards));
        let params = DeviceParams {
            // A new name each time: SPDK may still be letting go of the last one.
            name: format!("penstock-{}-{number}", face.id),
            product: "Penstock volume".to_owned(),
            uuid: unique(face.id, number),
            block_count: face.blocks,
            block_size: face.logical_block,
            nvme_nsid: u32::from(front_end.is_nvmf()),
            compare_and_write_blocks: COMPARE_BLOCKS,
            front_end,
        };
        let registered =
            spdk_rs::module::register(&params, device.clone()).map_err(spdk("registering the volume with SPDK", "See the log"))?;
        Ok((registered, device))
    }

    /// Opens a door; `done` is called when hosts can come in.
    pub fn add(self: &Rc<Self>, face: &VolumeFace, door: &Door, done: impl FnOnce(Result<Export, ExportError>) + 'static) {
        match door {
            Door::Vhost { name } => {
                let name = name.as_ref().map_or(face.name.as_str(), |name| name.as_str());
                done(self.add_vhost(face, name));
            }
            Door::Local => done(self.register(face, FrontEnd::InProcess).map(|(registered, device)| {
                let opened = Opened { address: registered.name().to_owned(), nqn: None };
                Export { device, registered, kind: Kind::Local, opened }
            })),
            Door::Nvmf { address, port, nqn } => {
                let nqn = match nqn.clone().map_or_else(|| nqn_of("", &face.name), Ok) {
                    Ok(nqn) => nqn,
                    Err(error) => return done(Err(error)),
                };
                let listen = Listen::Tcp { address: *address, port: *port };
                let shown = std::net::SocketAddr::new(*address, *port).to_string();
                self.add_nvme(face, nqn, listen, shown, FrontEnd::NvmfNetwork, Box::new(done));
            }
            Door::VfioUser { name } => {
                let name = name.as_ref().map_or(face.name.as_str(), |name| name.as_str());
                let nqn = match nqn_of("vfio-user:", name) {
                    Ok(nqn) => nqn,
                    Err(error) => return done(Err(error)),
                };
                let path = self.vfio_user_dir.join(name);
                // A socket that a killed penstockd left behind would be taken for a live one.
                let _ = std::fs::remove_file(path.join("cntrl"));
                let _ = std::fs::remove_file(path.join("bar0"));
                if let Err(e) = std::fs::create_dir_all(&path) {
                    return done(Err(ExportError::Directory { path, why: e.to_string() }));
                }
                let directory = path.display().to_string();
                let listen = Listen::VfioUser { directory: directory.clone() };
                self.add_nvme(face, nqn, listen, directory, FrontEnd::NvmfVfioUser, Box::new(done));
            }
        }
    }

    fn add_vhost(&self, face: &VolumeFace, name: &str) -> Result<Export, ExportError> {
        let (registered, device) = self.register(face, FrontEnd::Other)?;
        let path = self.vhost_dir.join(name);
        // Left behind by a penstockd that was killed; nobody else uses this directory.
        let _ = std::fs::remove_file(&path);
        let options =
            vhost::ControllerOptions { name: name.to_owned(), bdev: registered.name().to_owned(), core_mask: None, readonly: false };
        let created = vhost::create(&options).or_else(|errno| {
            // A controller whose guest would not go when its door was closed by force is empty, and makes room once the guest has gone.
            if errno == Errno::EXIST && vhost::remove(name).is_ok() { vhost::create(&options) } else { Err(errno) }
        });
        if let Err(errno) = created {
            registered.unregister(|_| ());
            return Err(spdk("making the vhost controller", "Is another volume's door of that name open?")(errno));
        }
        let opened = Opened { address: path.display().to_string(), nqn: None };
        Ok(Export { device, registered, kind: Kind::Vhost { controller: name.to_owned() }, opened })
    }

    fn add_nvme(self: &Rc<Self>, face: &VolumeFace, nqn: Nqn, listen: Listen, shown: String, front_end: FrontEnd, done: Done<Export>) {
        let (registered, device) = match self.register(face, front_end) {
            Ok(pair) => pair,
            Err(error) => return done(Err(error)),
        };
        // One path by nature: it serves, whoever leads.
        let serves = face.serves.filter(|_| front_end == FrontEnd::NvmfNetwork);
        let options = SubsystemOptions {
            nqn: nqn.as_str().to_owned(),
            serial_number: serial(face.id),
            model_number: "Penstock volume".to_owned(),
            namespaces_max: 1,
            passthrough: true,
            allow_any_host: true,
            ana_reporting: serves.is_some(),
            cntlid_range: (face.controllers.first, face.controllers.last),
        };
        let subsystem = match self.nvmf.create_subsystem(&options) {
            Ok(subsystem) => subsystem,
            Err(errno) => {
                registered.unregister(|_| ());
                return done(Err(spdk("making the NVMe subsystem", "Is another volume's door of that NQN open?")(errno)));
            }
        };
        let namespace = NamespaceOptions {
            bdev: registered.name().to_owned(),
            nsid: 1,
            nguid: face.id.to_bytes(),
            uuid: face.id.to_bytes(),
            ana_group: 0,
        };
        if let Err(errno) = subsystem.add_namespace(&namespace) {
            subsystem.destroy(move |_| registered.unregister(|_| ()));
            return done(Err(spdk("adding the namespace", "See the log for SPDK's reason")(errno)));
        }
        let this = self.clone();
        let name = options.nqn;
        self.gate.starting.set(self.gate.starting.get() + 1);
        subsystem.start(move |result| {
            this.gate.starting.set(this.gate.starting.get() - 1);
            let opened = Opened { address: shown, nqn: Some(nqn.clone()) };
            let mut export = Export { device, registered, kind: Kind::Nvme { nqn: nqn.clone(), listen: None }, opened };
            if let Err(errno) = result {
                this.remove(export, |_| ());
                return done(Err(spdk("starting the NVMe subsystem", "See the log for SPDK's reason")(errno)));
            }
            this.when_open(move |this| {
                if let Err(error) = this.listen(&listen) {
                    this.remove(export, |_| ());
                    return done(Err(error));
                }
                export.kind = Kind::Nvme { nqn, listen: Some(listen.clone()) };
                let target = this.clone();
                if let (Kind::Nvme { nqn, .. }, Some(serves)) = (&export.kind, serves) {
                    this.begin_path(nqn, listen.clone(), serves);
                }
                this.associate(name, listen, super::ana::state(serves.unwrap_or(true)), move |result| match result {
                    Ok(()) => done(Ok(export)),
                    Err(errno) => {
                        target.remove(export, |_| ());
                        done(Err(spdk("adding the listener", "See the log for SPDK's reason")(errno)));
                    }
                });
            });
            this.try_gate();
        });
    }

    /// Makes a running subsystem reachable at an address.
    fn associate(self: &Rc<Self>, nqn: String, listen: Listen, state: AnaState, done: impl FnOnce(Result<(), Errno>) + 'static) {
        let nvmf = self.nvmf;
        let Some(subsystem) = nvmf.find_subsystem(&nqn) else { return done(Err(Errno::NODEV)) };
        subsystem.pause(move |paused| {
            let Some(subsystem) = nvmf.find_subsystem(&nqn).filter(|_| paused.is_ok()) else {
                return done(Err(paused.err().unwrap_or(Errno::NODEV)));
            };
            subsystem.add_listener(&listen, state, move |added| match nvmf.find_subsystem(&nqn) {
                Some(subsystem) => subsystem.resume(move |resumed| done(added.and(resumed))),
                None => done(Err(Errno::NODEV)),
            });
        });
    }

    fn when_open(self: &Rc<Self>, f: impl FnOnce(&Rc<Self>) + 'static) {
        if self.gate.open.get() {
            f(self);
        } else {
            self.gate.waiting.borrow_mut().push(Box::new(f));
        }
    }

    /// The doors of the last run have been asked for: hosts may come in as soon as the last of them has started.
    pub fn open_gate(self: &Rc<Self>) {
        self.gate.asked.set(true);
        self.try_gate();
    }

    fn try_gate(self: &Rc<Self>) {
        if self.gate.open.get() || !self.gate.asked.get() || self.gate.starting.get() > 0 {
            return;
        }
        self.gate.open.set(true);
        let waiting = self.gate.waiting.take();
        for f in waiting {
            f(self);
        }
    }

    /// Closes a door; `done` when the last host has let go. Waits for outstanding commands, without a bound of its own.
    pub fn remove(self: &Rc<Self>, export: Export, done: impl FnOnce(Result<(), ExportError>) + 'static) {
        let Export { device, registered, kind, .. } = export;
        device.close();
        let unregister = move |done: Box<dyn FnOnce(Result<(), ExportError>)>| {
            registered.unregister(move |result| done(result.map_err(spdk("unregistering the volume", "See the log"))));
        };
        match kind {
            // Whoever has it open is told to let go.
            Kind::Local => unregister(Box::new(done)),
            Kind::Vhost { controller } => {
                if vhost::remove(&controller).is_ok() {
                    return unregister(Box::new(done));
                }
                // A guest is connected: taking the device away answers it with errors from now on.
                let last = move |result: Result<(), ExportError>| {
                    if let Err(errno) = vhost::remove(&controller) {
                        tracing::warn!(controller, %errno, "a vhost socket stays until its guest has gone");
                    }
                    done(result);
                };
                unregister(Box::new(last));
            }
            Kind::Nvme { nqn, listen } => {
                self.end_path(&nqn);
                let this = self.clone();
                let running = self.nvmf.find_subsystem(nqn.as_str());
                let destroy = move |result: Result<(), Errno>| {
                    if let Err(errno) = result {
                        tracing::warn!(%nqn, %errno, "an NVMe subsystem did not stop");
                    }
                    let subsystem = this.nvmf.find_subsystem(nqn.as_str());
                    let last = move |_: Result<(), Errno>| {
                        if let Some(listen) = &listen {
                            this.unlisten(listen);
                        }
                        unregister(Box::new(done));
                    };
                    match subsystem {
                        Some(subsystem) => subsystem.destroy(last),
                        None => last(Ok(())),
                    }
                };
                match running {
                    Some(subsystem) => subsystem.stop(destroy),
                    None => destroy(Ok(())),
                }
            }
        }
    }
}

impl Export {
    /// The subsystem whose paths hosts are told of, where it is one that may have several.
    pub fn path(&self) -> Option<&Nqn> {
        if let Kind::Nvme { nqn, listen: Some(Listen::Tcp { .. }) } = &self.kind { Some(nqn) } else { None }
    }

    /// Host NQNs that are connected, or sessions where hosts have no names.
    pub fn connected_hosts(&self) -> Vec<String> {
        match &self.kind {
            Kind::Nvme { nqn, .. } => {
                let target = spdk_rs::nvmf::Target::get().ok();
                let mut hosts = target.and_then(|t| t.find_subsystem(nqn.as_str())).map(|s| s.hosts()).unwrap_or_default();
                hosts.sort();
                hosts
            }
            // SPDK does not say who has a bdev open.
            Kind::Local => Vec::new(),
            Kind::Vhost { controller } => match vhost::sessions(controller) {
                Ok(sessions) if sessions > 0 => vec![format!("{sessions} vhost-user sessions")],
                _ => Vec::new(),
            },
        }
    }

    /// A new size in logical blocks.
    ///
    /// # Errors
    /// When SPDK refuses: an open device cannot shrink.
    pub fn resize(&self, blocks: u64) -> Result<(), ExportError> {
        self.registered.resize(blocks).map_err(spdk("resizing", "An exported volume cannot shrink: unexport it first"))?;
        self.device.set_blocks(blocks);
        Ok(())
    }
}

/// The NQN of a volume where none was given.
fn nqn_of(kind: &str, name: &str) -> Result<Nqn, ExportError> {
    format!("nqn.2026-11.io.penstock:{kind}{name}").parse().map_err(ExportError::Nqn)
}

/// 20 characters that differ between volumes: the id without its first 48 bits, which all volumes of a cluster share.
fn serial(id: VolumeId) -> String {
    let bytes = id.to_bytes();
    let mut serial: String = bytes[6..].iter().map(|b| format!("{b:02x}")).collect();
    serial.truncate(20);
    serial
}

/// SPDK wants every bdev's UUID to differ, and a volume may have several doors; the host sees the namespace's own, not this.
fn unique(id: VolumeId, number: u64) -> [u8; 16] {
    let mut uuid = id.to_bytes();
    for (byte, more) in uuid[..8].iter_mut().zip(number.to_le_bytes()) {
        *byte ^= more;
    }
    uuid
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_fit_and_differ() {
        let id = |text: &str| text.parse::<VolumeId>().unwrap();
        let (a, b) = (id("0194a5c1-b2d3-8001-8000-000000000001"), id("0194a5c1-b2d3-8001-8000-000000000002"));
        assert_eq!(serial(a), "80018000000000000001");
        assert_ne!(serial(a), serial(b));
        assert_ne!(unique(a, 0), unique(a, 1));
    }

    #[test]
    fn nqn_of_a_volume_is_valid() {
        assert_eq!(nqn_of("", "db-0").unwrap().as_str(), "nqn.2026-11.io.penstock:db-0");
        assert_eq!(nqn_of("vfio-user:", "db_0").unwrap().as_str(), "nqn.2026-11.io.penstock:vfio-user:db_0");
    }
}
