//! How a drive comes to serve: opened, looked at, formatted if it is blank and asked for, its stores recovered.
//!
//! Each step ends in a closure; a step that fails lets go of what the steps before it took. Not here: drives that serve (`drives`).

use std::collections::BTreeMap;
use std::rc::Rc;

use penstock_api::rpc::{Barrier, DriveAddParams, DriveContent, DriveInfo, DriveProbeInfo, DriveState, ErrorCode, RpcError};
use penstock_api::{ByteSize, DriveId, DriveKind, DriveSpec};
use penstock_engine::{Limits, OpenError, RecoveryReport, StoreConfig};
use penstock_wire::label::{Geometry, Label};
use penstock_wire::{BLOCK, BlockAddr, Generation, Incarnation};
use spdk_rs::bdev::BdevEvent;
use spdk_rs::nvme::NvmeAddress;

use super::drives::{Drive, Gate, StorePlace};
use super::{Answer, Node, fail};
use crate::core::{CoreIndex, DriveKey, Job, Outcome, Step};
use crate::disk::{Backend, DiskIndex, barrier_in_use, open_bdev, open_file, prospect};
use crate::label::{self, Claim, Decision, Found};
use crate::placement;
use crate::state::DriveEntry;

type Opened = Box<dyn FnOnce(&Rc<Node>, Result<Backend, RpcError>)>;

fn unusable(error: impl std::fmt::Display) -> RpcError {
    fail(ErrorCode::Invalid, error.to_string(), "name another drive, or put right what is said")
}

/// What SPDK knows a drive's controller as.
fn controller_name(key: DriveKey) -> String {
    format!("penstock-drive-{}", key.0)
}

/// For one opening of a store: nobody had it before.
fn new_life() -> Incarnation {
    let mut life = [0; 16];
    life[..8].copy_from_slice(&super::run_number().to_le_bytes());
    life[8..].copy_from_slice(&super::run_number().to_le_bytes());
    Incarnation(life)
}

/// Reads that tell what lies on a drive: its first MiB (or all of it), and its last block.
fn probe_steps(blocks: u64) -> Vec<Step> {
    let head = blocks.min((label::HEAD_BYTES / BLOCK) as u64) as u32;
    vec![Step::Read { at: BlockAddr(0), blocks: head }, Step::Read { at: BlockAddr(blocks - 1), blocks: 1 }]
}

impl Node {
    /// Opens what a spec names. Blocks for files, which is short; others answer later.
    fn open_backend(self: &Rc<Self>, spec: &DriveSpec, key: DriveKey, may_create: bool, then: Opened) {
        let on_event = move |event: BdevEvent| {
            // Not from inside SPDK's callback: what follows closes the very device.
            let app = spdk_rs::thread::app_thread().expect("bdevs are opened on the app thread");
            let _ = app.send(move || {
                if let Some(node) = super::current() {
                    node.on_bdev_event(key, event);
                }
            });
        };
        let result = match &spec.kind {
            DriveKind::File { path, size } => {
                let size = if may_create { size.map(ByteSize::bytes) } else { None };
                match open_file(path, size) {
                    // Whoever reads this has lost a drive: a blank one in its place is the last thing that helps.
                    Err(_) if !may_create && !std::path::Path::new(path).exists() => Err(fail(
                        ErrorCode::Invalid,
                        format!("{path} does not exist: the file has to be put back, or its file system mounted"),
                        "if it is gone for good, remove the drive: `penstock pool rm`",
                    )),
                    opened => opened.map_err(unusable),
                }
            }
            DriveKind::Block { path } => open_file(path, None).map_err(unusable),
            DriveKind::Malloc { name, size } => {
                let mut uuid = [0; 16];
                uuid[..8].copy_from_slice(&super::run_number().to_le_bytes());
                uuid[8..12].copy_from_slice(&key.0.to_le_bytes());
                match spdk_rs::bdev::create_malloc(name, uuid, size.bytes() / BLOCK as u64, BLOCK as u32) {
                    Ok(()) => open_bdev(name, Barrier::NoneNeeded, true, on_event).map_err(unusable),
                    Err(errno) => Err(fail(
                        ErrorCode::Capacity,
                        format!("memory for {spec} cannot be had: {errno}"),
                        "make it smaller, or raise --mem-mib; a name that another bdev has is refused too",
                    )),
                }
            }
            DriveKind::Bdev { name } => open_bdev(name, Barrier::Missing, false, on_event).map_err(unusable),
            DriveKind::Nvme { address, namespace } => {
                let address = NvmeAddress::Pcie(address.to_string());
                return self.attach_nvme(address, *namespace, spec.clone(), key, on_event, then);
            }
            DriveKind::VfioUser { path } => {
                let address = NvmeAddress::VfioUser(path.clone());
                return self.attach_nvme(address, 1, spec.clone(), key, on_event, then);
            }
        };
        then(self, result);
    }

    /// An NVMe controller through SPDK's driver, and the one namespace of it that is the drive.
    fn attach_nvme(
        self: &Rc<Self>,
        address: NvmeAddress,
        namespace: u32,
        spec: DriveSpec,
        key: DriveKey,
        on_event: impl Fn(BdevEvent) + 'static,
        then: Opened,
    ) {
        let node = self.clone();
        spdk_rs::nvme::attach(&address, &controller_name(key), move |attached| {
            let names = match attached {
                Ok(names) => names,
                Err(errno) => {
                    let message = format!("{spec} cannot be attached: {errno}");
                    let hint = "is the controller bound to vfio-pci or uio_pci_generic (`penstock-hugepages status`), and free? --no-huge excludes PCIe drives";
                    return then(&node, Err(fail(ErrorCode::Invalid, message, hint)));
                }
            };
            let wanted = format!("{}n{namespace}", controller_name(key));
            let opened = if names.contains(&wanted) {
                open_bdev(&wanted, Barrier::Missing, false, on_event).map_err(unusable)
            } else {
                let message = format!("{spec}: the controller has no namespace {namespace}; it has {}", names.len());
                Err(fail(ErrorCode::NotFound, message, "name one that it has: nvme:ADDRESS/NAMESPACE"))
            };
            match opened {
                Ok(backend) => then(&node, Ok(backend)),
                Err(error) => node.forget_backend(&spec, key, move |node| then(node, Err(error))),
            }
        });
    }

    /// Lets go of what [`Self::open_backend`] made beside the backend, which must have been dropped; then calls `then`.
    pub(super) fn forget_backend(self: &Rc<Self>, spec: &DriveSpec, key: DriveKey, then: impl FnOnce(&Rc<Node>) + 'static) {
        let node = self.clone();
        let shown = spec.clone();
        let done = move |result: Result<(), spdk_rs::Errno>| {
            if let Err(errno) = result {
                tracing::warn!(spec = %shown, %errno, "SPDK does not let go of a drive");
            }
            then(&node);
        };
        match &spec.kind {
            DriveKind::Malloc { name, .. } => spdk_rs::bdev::delete_malloc(name, done),
            DriveKind::Nvme { .. } | DriveKind::VfioUser { .. } => spdk_rs::nvme::detach(&controller_name(key), done),
            DriveKind::File { .. } | DriveKind::Block { .. } | DriveKind::Bdev { .. } => done(Ok(())),
        }
    }

    /// Runs plain I/O on a drive, on the first core.
    fn run_job(
        self: &Rc<Self>,
        backend: Backend,
        steps: Vec<Step>,
        then: impl FnOnce(&Rc<Node>, Result<Vec<Vec<u8>>, RpcError>) + 'static,
    ) {
        self.ask_core(
            CoreIndex(0),
            move |core, replier| match core.attach_drive(&backend) {
                Ok(disk) => core.run_job(Job::new(disk, steps, move |outcome: Outcome| replier.reply((Some(disk), outcome)))),
                Err(error) => replier.reply((None, Err(error.to_string()))),
            },
            move |node, (disk, outcome): (Option<DiskIndex>, Outcome)| {
                let outcome = outcome.map_err(|why| fail(ErrorCode::Internal, why, "check the drive and the kernel's log"));
                // Only when the core has let go: whoever goes on may want to open the drive anew.
                match disk {
                    Some(disk) => node.ask_core(
                        CoreIndex(0),
                        move |core, replier| replier.reply(core.detach_drive(disk)),
                        move |node, _: bool| then(node, outcome),
                    ),
                    None => then(node, outcome),
                }
            },
        );
    }

    fn look_at(self: &Rc<Self>, backend: Backend, then: impl FnOnce(&Rc<Node>, Result<Found, RpcError>) + 'static) {
        let blocks = backend.blocks();
        if blocks < 2 {
            return then(self, Err(fail(ErrorCode::Invalid, "the drive has less than two blocks of 4 KiB", "use a larger drive")));
        }
        let last_at = (blocks - 1) * BLOCK as u64;
        self.run_job(backend, probe_steps(blocks), move |node, read| {
            then(node, read.map(|read| label::look(&read[0], &read[1], last_at)));
        });
    }

    fn look_and_forget(
        self: &Rc<Self>,
        backend: Backend,
        spec: DriveSpec,
        key: DriveKey,
        then: impl FnOnce(&Rc<Node>, Result<Found, RpcError>) + 'static,
    ) {
        self.look_at(backend, move |node, found| node.forget_backend(&spec, key, move |node| then(node, found)));
    }

    pub(super) fn drive_probe(self: &Rc<Self>, spec: DriveSpec, answer: Answer<DriveProbeInfo>) {
        let open = {
            let drives = self.drives.borrow();
            let found = drives.values().find(|d| d.spec.place() == spec.place() && d.label.is_some());
            found.map(|d| (d.label.clone().expect("filtered"), d.backend.as_ref().map_or(0, Backend::size), d.barrier, d.volatile))
        };
        if let Some((label, size, barrier, volatile)) = open {
            let content = label::ids(&label).map(|label| DriveContent::Ours { label });
            return answer(content.map(|content| DriveProbeInfo { size: ByteSize(size), content, barrier, volatile }));
        }
        match &spec.kind {
            DriveKind::File { path, size } if !std::path::Path::new(path).exists() => {
                let size = size.unwrap_or(ByteSize(0));
                return answer(prospect(path).map_err(unusable).map(|(barrier, volatile)| {
                    let barrier = barrier_in_use(barrier, spec.power_safe, volatile);
                    DriveProbeInfo { size, content: DriveContent::Blank, barrier, volatile }
                }));
            }
            // Made when it is added, so there is nothing to look at.
            DriveKind::Malloc { size, .. } => {
                return answer(Ok(DriveProbeInfo {
                    size: *size,
                    content: DriveContent::Blank,
                    barrier: Barrier::NoneNeeded,
                    volatile: true,
                }));
            }
            _ => {}
        }
        let key = self.next_drive_key();
        let power_safe = spec.power_safe;
        let probed = spec.clone();
        self.open_backend(
            &spec,
            key,
            false,
            Box::new(move |node, opened| {
                let backend = match opened {
                    Ok(backend) => backend,
                    Err(error) => return answer(Err(error)),
                };
                let (size, volatile) = (ByteSize(backend.size()), backend.is_volatile());
                let barrier = barrier_in_use(backend.barrier(), power_safe, volatile);
                node.look_and_forget(backend, probed, key, move |_, found| {
                    let content = found.and_then(|found| {
                        Ok(match found {
                            Found::Blank => DriveContent::Blank,
                            Found::Ours(label) => DriveContent::Ours { label: label::ids(&label)? },
                            Found::Foreign { what, at } => DriveContent::Foreign { what, at: ByteSize(at) },
                        })
                    });
                    answer(content.map(|content| DriveProbeInfo { size, content, barrier, volatile }));
                });
            }),
        );
    }

    pub(crate) fn drive_add(self: &Rc<Self>, params: DriveAddParams, answer: Answer<DriveInfo>) {
        if self.stop.is_stopping() {
            return answer(Err(fail(ErrorCode::NotReady, "penstockd is stopping", "try again when it runs again")));
        }
        if let Err(error) = self.claim(params.cluster_id, params.node_id) {
            return answer(Err(error));
        }
        let id = params.drive_id;
        enum Known {
            No,
            Same(DriveState),
            Other(RpcError),
        }
        let known = {
            let drives = self.drives.borrow();
            match drives.get(&id) {
                Some(drive) if drive.spec.place() == params.spec.place() => Known::Same(drive.state),
                Some(drive) => Known::Other(fail(
                    ErrorCode::Conflict,
                    format!("drive {id} is {}, not {}", drive.spec, params.spec),
                    "remove it first, or use another id",
                )),
                None => match drives.iter().find(|(_, d)| d.spec.place() == params.spec.place()) {
                    Some((other, _)) => Known::Other(fail(
                        ErrorCode::Conflict,
                        format!("{} is in use as drive {other}", params.spec.place()),
                        "name another drive",
                    )),
                    None => Known::No,
                },
            }
        };
        match known {
            Known::Other(error) => answer(Err(error)),
            Known::Same(DriveState::Opening) => {
                if let Some(drive) = self.drives.borrow_mut().get_mut(&id) {
                    drive.waiters.push(answer);
                }
            }
            // A drive that was gone may have come back.
            Known::Same(DriveState::Missing) => {
                self.drives.borrow_mut().remove(&id);
                self.begin_drive(params, answer);
            }
            Known::Same(_) => self.drive_info(id, answer),
            Known::No => self.begin_drive(params, answer),
        }
    }

    pub(super) fn begin_drive(self: &Rc<Self>, params: DriveAddParams, answer: Answer<DriveInfo>) {
        // Before a file is made for it: what is refused leaves nothing behind.
        if let DriveKind::File { path, size: Some(size) } = &params.spec.kind
            && !params.open_only
            && !std::path::Path::new(path).exists()
            && let Err(error) = self.cut(&params, size.bytes() / BLOCK as u64)
        {
            return answer(Err(error));
        }
        let key = self.next_drive_key();
        let mut drive = Drive::new(key, params.spec.clone(), DriveState::Opening, "it is being opened".to_owned());
        drive.waiters.push(answer);
        self.drives.borrow_mut().insert(params.drive_id, drive);
        let spec = params.spec.clone();
        let may_create = !params.open_only;
        self.open_backend(
            &spec,
            key,
            may_create,
            Box::new(move |node, opened| {
                let id = params.drive_id;
                let backend = match opened {
                    Ok(backend) => backend,
                    Err(error) => return node.drive_failed(id, error),
                };
                let barrier = barrier_in_use(backend.barrier(), params.spec.power_safe, backend.is_volatile());
                if barrier == Barrier::Missing {
                    let message = format!("{} has no barrier that is known to reach its media: what it acknowledges may be lost", params.spec);
                    let hint = "use another drive; if its operator vouches that it keeps what it acknowledged through power loss, add ?power_safe=true";
                    return node.drive_failed(id, fail(ErrorCode::Invalid, message, hint));
                }
                if let Some(drive) = node.drives.borrow_mut().get_mut(&id) {
                    drive.backend = Some(backend.clone());
                    drive.barrier = barrier;
                    drive.volatile = backend.is_volatile();
                }
                let probed = backend.clone();
                let look = move |node: &Rc<Node>, found: Result<Found, RpcError>| {
                    let claim = Claim {
                        cluster: params.cluster_id,
                        node: params.node_id,
                        drive: id,
                        force: params.force,
                        open_only: params.open_only,
                    };
                    match found.and_then(|found| label::decide(found, claim, probed.blocks())) {
                        Ok(Decision::Open(label)) => node.mend_label(id, label, probed),
                        Ok(Decision::Format) => node.format(params, probed),
                        Err(error) => node.drive_failed(id, error),
                    }
                };
                if barrier != Barrier::Flush {
                    return node.look_at(backend, look);
                }
                // A drive that refuses a flush now would be fenced by its first write.
                let flushed = backend.clone();
                node.run_job(flushed, vec![Step::Flush], move |node, result| match result {
                    Ok(_) => node.look_at(backend, look),
                    Err(error) => node.drive_failed(id, error),
                });
            }),
        );
    }

    /// Writes the label's copies anew where they are not whole: one that is left would not survive its own damage.
    fn mend_label(self: &Rc<Self>, id: DriveId, label: Label, backend: Backend) {
        // A drive that has grown has its copy elsewhere; a fenced one takes no writes.
        if backend.blocks() != label.drive_blocks || self.state.borrow().fence(id).is_some() {
            return self.open_stores(id, label);
        }
        let places = [BlockAddr(0), BlockAddr(backend.blocks() - 1)];
        let reads = places.map(|at| Step::Read { at, blocks: 1 }).into();
        self.run_job(backend.clone(), reads, move |node, read| {
            let read = match read {
                Ok(read) => read,
                Err(error) => return node.drive_failed(id, error),
            };
            let whole = label.encode();
            let bad = places.into_iter().zip(&read).filter(|(_, block)| Label::decode(block).as_ref() != Ok(&label));
            let mut steps: Vec<Step> = bad.map(|(at, _)| Step::Write { at, bytes: whole.clone() }).collect();
            if steps.is_empty() {
                return node.open_stores(id, label);
            }
            tracing::warn!(drive = %id, "one of the label's two copies is damaged: it is written anew");
            if node.drives.borrow().get(&id).is_some_and(|d| d.barrier == Barrier::Flush) {
                steps.push(Step::Flush);
            }
            node.run_job(backend, steps, move |node, written| match written {
                Ok(_) => node.open_stores(id, label),
                Err(error) => node.drive_failed(id, error),
            });
        });
    }

    /// How a drive of this many blocks would be cut.
    fn cut(&self, params: &DriveAddParams, blocks: u64) -> Result<placement::Cut, RpcError> {
        let (cores, stores) = (self.cores.borrow().len(), params.stores.or(params.spec.stores));
        placement::cut(blocks, cores, stores, params.oplog_bytes.map(ByteSize::bytes))
            .map_err(|e| fail(ErrorCode::Invalid, e.to_string(), "see `penstock pool add --help`"))
    }

    fn format(self: &Rc<Self>, params: DriveAddParams, backend: Backend) {
        let id = params.drive_id;
        let planned = self.cut(&params, backend.blocks()).and_then(|cut| {
            let mut incarnation = [0; 16];
            incarnation[..8].copy_from_slice(&super::run_number().to_le_bytes());
            incarnation[8..].copy_from_slice(&super::run_number().to_le_bytes());
            // Seldom would either be 0, and a label of zeros must not look blank.
            incarnation[15] |= 1;
            Label::plan(
                penstock_wire::ClusterId(params.cluster_id.to_bytes()),
                penstock_wire::NodeId(params.node_id.to_bytes()),
                penstock_wire::DriveId(id.to_bytes()),
                Incarnation(incarnation),
                backend.blocks(),
                cut.stores,
                cut.ring_blocks,
            )
            .and_then(|label| penstock_engine::format::format(&label).map(|blocks| (label, blocks)))
            .map_err(|e| fail(ErrorCode::Invalid, e.to_string(), "use a larger drive, or fewer stores"))
        });
        let (label, blocks) = match planned {
            Ok(planned) => planned,
            Err(error) => return self.drive_failed(id, error),
        };
        let flush = self.drives.borrow().get(&id).is_some_and(|d| d.barrier == Barrier::Flush);
        let last = blocks.len() - 1;
        let mut steps = Vec::new();
        for (at, (place, bytes)) in blocks.into_iter().enumerate() {
            if at == last && flush {
                steps.push(Step::Flush);
            }
            steps.push(Step::Write { at: place, bytes });
        }
        if flush {
            steps.push(Step::Flush);
        }
        tracing::info!(drive = %id, spec = %params.spec, stores = label.stores.len(), "formatting a drive");
        self.run_job(backend, steps, move |node, written| match written {
            Ok(_) => node.open_stores(id, label),
            Err(error) => node.drive_failed(id, error),
        });
    }

    fn open_stores(self: &Rc<Self>, id: DriveId, label: Label) {
        let fenced = self.state.borrow().fence(id);
        let accept_lost_log = self.accepting.borrow_mut().remove(&id);
        let mut load: Vec<u32> = vec![0; self.cores.borrow().len()];
        for drive in self.drives.borrow().values() {
            for store in &drive.stores {
                load[usize::from(store.core.0)] += 1;
            }
        }
        let cores = placement::place_stores(&mut load, label.stores.len());
        let fallen: Vec<Option<String>> = {
            let state = self.state.borrow();
            (0..label.stores.len() as u32).map(|store| state.quarantine(id, store).map(str::to_owned)).collect()
        };
        let mut by_core: BTreeMap<CoreIndex, Vec<(StoreConfig, BlockAddr)>> = BTreeMap::new();
        let Some((key, backend)) = ({
            let mut drives = self.drives.borrow_mut();
            drives.get_mut(&id).and_then(|drive| {
                drive.label = Some(label.clone());
                let place = |(&core, quarantined): (&usize, &Option<String>)| StorePlace {
                    core: CoreIndex(core as u16),
                    serving: false,
                    quarantined: quarantined.clone(),
                    recovery: None,
                };
                drive.stores = cores.iter().zip(&fallen).map(place).collect();
                let barrier =
                    if drive.barrier == Barrier::Flush { penstock_engine::Barrier::Flush } else { penstock_engine::Barrier::NotNeeded };
                for (no, (share, &core)) in label.stores.iter().zip(&cores).enumerate() {
                    if fallen[no].is_some() {
                        continue;
                    }
                    let config = StoreConfig {
                        geometry: Geometry::of(share).expect("checked when the label was read"),
                        incarnation: label.incarnation,
                        store: no as u32,
                        barrier,
                        fenced,
                        limits: Limits::default(),
                        replication: penstock_engine::Replication {
                            node: label.node,
                            life: new_life(),
                            witness: self.state.borrow().opened(id, no as u32, label.incarnation),
                            ..Default::default()
                        },
                        accept_lost_log,
                        canary: self.config.canary,
                    };
                    by_core.entry(CoreIndex(core as u16)).or_default().push((config, share.start));
                }
                drive.backend.clone().map(|backend| (drive.key, backend))
            })
        }) else {
            return;
        };
        for (no, panic) in fallen.iter().enumerate().filter_map(|(no, panic)| Some((no, panic.as_ref()?))) {
            tracing::error!(drive = %id, store = no, panic, "a store is quarantined since an earlier life: it is not run");
        }
        if by_core.is_empty() {
            return self.on_store_settled(id);
        }
        for (core, stores) in by_core {
            let backend = backend.clone();
            self.ask_core(
                core,
                move |core, replier| {
                    let attached = core.attach_drive(&backend);
                    if let Ok(disk) = &attached {
                        for (config, start) in stores {
                            core.open_store(key, config, *disk, start);
                        }
                    }
                    replier.reply(attached.map_err(|e| e.to_string()));
                },
                move |node, attached: Result<DiskIndex, String>| match attached {
                    Ok(disk) => {
                        if let Some(drive) = node.drives.borrow_mut().get_mut(&id) {
                            drive.disks.insert(core, disk);
                        }
                    }
                    Err(why) => node.drive_failed(id, fail(ErrorCode::Internal, why, "see the log")),
                },
            );
        }
    }

    /// Opening cannot go on: whoever waits is told, and the drive is let go.
    pub(super) fn drive_failed(self: &Rc<Self>, id: DriveId, error: RpcError) {
        tracing::warn!(drive = %id, %error, "a drive does not open");
        let Some(drive) = self.drives.borrow_mut().remove(&id) else { return };
        let remembered = self.state.borrow().get().drives.iter().any(|d| d.drive_id == id);
        let Drive { key, spec, waiters, disks, backend, .. } = drive;
        let forget = {
            let spec = spec.clone();
            move |node: &Rc<Node>| {
                // There is something to forget only where something was opened.
                if backend.is_some() {
                    drop(backend);
                    node.forget_backend(&spec, key, |_| ());
                }
            }
        };
        if disks.is_empty() {
            forget(self);
        } else {
            let gate = Gate::new(disks.len(), forget);
            for (core, disk) in disks {
                let gate = gate.clone();
                self.close_on_core(core, key, Some(disk), move |node| gate.pass(node));
            }
        }
        if remembered {
            // It was ours before: shown as missing until it comes back or is removed.
            let gone = Drive::new(key, spec, DriveState::Missing, error.message.clone());
            self.drives.borrow_mut().insert(id, gone);
        }
        for waiter in waiters {
            waiter(Err(error.clone()));
        }
    }

    pub(super) fn on_store_serving(self: &Rc<Self>, key: DriveKey, store: u32, report: RecoveryReport, ms: u64) {
        let Some(id) = self.drive_of_key(key) else { return };
        tracing::info!(
            drive = %id, store, ms, batches = report.batches, entries = report.entries, bytes = report.bytes,
            dropped_batches = report.dropped_batches, lost_blocks = report.lost_blocks, "a store serves"
        );
        let life = self.drives.borrow().get(&id).and_then(|drive| drive.label.as_ref().map(|label| label.incarnation));
        if let Some(life) = life
            && let Err(error) = self.state.borrow_mut().note_opened(id, store, life, Generation(report.generation))
        {
            tracing::warn!(%error, drive = %id, "the drive's opening cannot be written down: after a restart more of its peers will be asked");
        }
        if let Some(place) = self.drives.borrow_mut().get_mut(&id).and_then(|drive| drive.stores.get_mut(store as usize)) {
            place.serving = true;
            place.recovery = Some((report, ms));
        }
        self.on_store_settled(id);
    }

    /// A store of the drive serves, or never will: when that is known of all, the drive is open.
    pub(super) fn on_store_settled(self: &Rc<Self>, id: DriveId) {
        let settled = |drive: &Drive| drive.stores.iter().all(|s| s.serving || s.quarantined.is_some());
        if !self.drives.borrow().get(&id).is_some_and(settled) {
            return;
        }
        self.judge_drive(id);
        let (spec, waiters) = {
            let mut drives = self.drives.borrow_mut();
            let Some(drive) = drives.get_mut(&id) else { return };
            (drive.spec.clone(), std::mem::take(&mut drive.waiters))
        };
        if !spec.is_volatile() {
            let kept = self.remember(|state| {
                state.drives.retain(|d| d.drive_id != id);
                state.drives.push(DriveEntry { drive_id: id, spec });
            });
            if let Err(error) = kept {
                tracing::warn!(%error, "the drive will not be opened by itself after a restart");
            }
        }
        for waiter in waiters {
            self.drive_info(id, waiter);
        }
        self.restore_exports(id);
    }

    pub(super) fn on_store_failed(self: &Rc<Self>, key: DriveKey, store: u32, why: &OpenError) {
        let Some(id) = self.drive_of_key(key) else { return };
        let message = format!("store {store} of the drive cannot be opened: {why}");
        self.drive_failed(id, fail(ErrorCode::Internal, message, "the drive's data are as they were; see docs/operations.md"));
    }

    /// Opens a drive for a look at it, and closes it again.
    pub(super) fn drive_look(self: &Rc<Self>, spec: DriveSpec, then: impl FnOnce(&Rc<Node>, Result<Found, RpcError>) + 'static) {
        let key = self.next_drive_key();
        let looked = spec.clone();
        self.open_backend(
            &spec,
            key,
            false,
            Box::new(move |node, opened| match opened {
                Ok(backend) => node.look_and_forget(backend, looked, key, then),
                Err(error) => then(node, Err(error)),
            }),
        );
    }
}
