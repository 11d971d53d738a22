//! Devices written in Rust: the bdev module `penstock`. What SPDK's front ends submit arrives as [`HostIo`].
//!
//! A device reports no alignment, boundary, segment or size limit, since each makes SPDK split one command into several. Not
//! here: what a device answers. Not used: SPDK's QoS and its queueing of refused I/O, which release commands of dead connections.

use crate::app;
use crate::bdev::{IoMemory, IoMemoryMut, Ranges};
use crate::callback::{self, c_string};
use crate::status::{Errno, NvmeStatus, Status};
use crate::thread;
use std::ffi::{c_int, c_void};
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;

/// What a host wants. Kinds that a device does not support do not arrive, but for `Reset`, which always may.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum IoKind {
    Read,
    Write,
    WriteZeroes,
    Unmap,
    Flush,
    Reset,
    Abort,
    /// [`HostIo::compare`] holds what to compare with, the payload what to write.
    CompareAndWrite,
    /// A raw NVMe I/O command: all of them, in a passthrough subsystem.
    NvmeIo,
    /// A raw NVMe admin command that names our namespace, in a passthrough subsystem.
    NvmeAdmin,
    /// One of SPDK's kinds that has no name here, by its number. Answer it with [`NvmeStatus::INVALID_OPCODE`].
    Other(u8),
}

impl IoKind {
    fn from_c(kind: u8) -> IoKind {
        match u32::from(kind) {
            spdk_sys::SPDK_BDEV_IO_TYPE_READ => IoKind::Read,
            spdk_sys::SPDK_BDEV_IO_TYPE_WRITE => IoKind::Write,
            spdk_sys::SPDK_BDEV_IO_TYPE_WRITE_ZEROES => IoKind::WriteZeroes,
            spdk_sys::SPDK_BDEV_IO_TYPE_UNMAP => IoKind::Unmap,
            spdk_sys::SPDK_BDEV_IO_TYPE_FLUSH => IoKind::Flush,
            spdk_sys::SPDK_BDEV_IO_TYPE_RESET => IoKind::Reset,
            spdk_sys::SPDK_BDEV_IO_TYPE_ABORT => IoKind::Abort,
            spdk_sys::SPDK_BDEV_IO_TYPE_COMPARE_AND_WRITE => IoKind::CompareAndWrite,
            spdk_sys::SPDK_BDEV_IO_TYPE_NVME_IO | spdk_sys::SPDK_BDEV_IO_TYPE_NVME_IO_MD | spdk_sys::SPDK_BDEV_IO_TYPE_NVME_IOV_MD => {
                IoKind::NvmeIo
            }
            spdk_sys::SPDK_BDEV_IO_TYPE_NVME_ADMIN => IoKind::NvmeAdmin,
            _ => IoKind::Other(kind),
        }
    }
}

/// Which front end a device is for: it decides whose memory payloads are, and whether commands know their NVMe association. One
/// that is for NVMe-oF opens for nothing else: neither [`crate::bdev::Bdev`] nor [`crate::vhost`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum FrontEnd {
    /// NVMe-oF over TCP or RDMA: payload is the target's own memory until the command is completed.
    NvmfNetwork,
    /// NVMe-oF over vfio-user: payload is the guest's memory.
    NvmfVfioUser,
    /// Users within this process that leave a command's memory alone until it is completed, as [`crate::bdev::BdevChannel`] does.
    InProcess,
    /// vhost-user-blk and all else: payload is somebody else's memory.
    Other,
}

impl FrontEnd {
    fn from_c(value: u8) -> Self {
        [Self::NvmfNetwork, Self::NvmfVfioUser, Self::InProcess].into_iter().find(|kind| *kind as u8 == value).unwrap_or(Self::Other)
    }

    /// Commands come with an NVMe association.
    pub const fn is_nvmf(self) -> bool {
        matches!(self, Self::NvmfNetwork | Self::NvmfVfioUser)
    }
}

/// What to register.
#[derive(Clone, Debug)]
pub struct DeviceParams {
    /// Unique among all bdevs.
    pub name: String,
    pub product: String,
    pub uuid: [u8; 16],
    pub block_count: u64,
    /// Bytes.
    pub block_size: u32,
    /// Nonzero: may sit in a passthrough subsystem, and is the namespace id that raw commands then carry.
    pub nvme_nsid: u32,
    /// Blocks that compare-and-write takes at most.
    pub compare_and_write_blocks: u16,
    pub front_end: FrontEnd,
}

/// A block device.
///
/// `Self` is shared by all threads; `Channel` belongs to one. SPDK may make channels on any of its threads.
pub trait Device: Send + Sync + Sized + 'static {
    type Channel: 'static;

    /// Any thread. Leave [`IoKind::Flush`] out and NVMe-oF answers it with success.
    fn supports(&self, kind: IoKind) -> bool;

    /// On the thread that will use it. None: this thread cannot use the device.
    fn open_channel(self: &Arc<Self>) -> Option<Self::Channel>;

    /// On the channel's thread. Complete `io` now (costs a message) or later, on this thread.
    fn submit(channel: &Self::Channel, io: HostIo);
}

struct Context<D> {
    device: Arc<D>,
    front_end: FrontEnd,
}

struct Channel<D: Device> {
    channel: D::Channel,
    front_end: FrontEnd,
}

extern "C" fn submit<D: Device>(channel: *mut c_void, io: *mut spdk_sys::ps_io) {
    // SAFETY: made by channel_create for this device type; SPDK submits only between it and channel_destroy, on this thread.
    let channel = unsafe { &*channel.cast::<Channel<D>>() };
    let view = NonNull::new(io).expect("the shim gives a view");
    // SAFETY: the shim's view of a live I/O, which lies in it; nobody else has it yet.
    unsafe { (*view.as_ptr()).front_end = channel.front_end as u8 };
    D::submit(&channel.channel, HostIo { view });
}

extern "C" fn supports<D: Device>(context: *mut c_void, kind: u8) -> bool {
    // SAFETY: the context lives from registration until `release`, SPDK's last call. Only shared access, and D is Sync.
    let context = unsafe { &*context.cast::<Context<D>>() };
    let kind = match u32::from(kind) {
        // SPDK asks for each of the raw kinds; a device of ours takes them in any shape of buffer, or not at all.
        spdk_sys::SPDK_BDEV_IO_TYPE_INVALID => return false,
        _ => IoKind::from_c(kind),
    };
    !matches!(kind, IoKind::Other(_)) && context.device.supports(kind)
}

extern "C" fn channel_create<D: Device>(context: *mut c_void) -> *mut c_void {
    // SAFETY: as in `supports`.
    let context = unsafe { &*context.cast::<Context<D>>() };
    match context.device.open_channel() {
        Some(channel) => Box::into_raw(Box::new(Channel::<D> { channel, front_end: context.front_end })).cast(),
        None => std::ptr::null_mut(),
    }
}

extern "C" fn channel_destroy<D: Device>(_context: *mut c_void, channel: *mut c_void) {
    // SAFETY: made by channel_create on this thread; SPDK has no I/O on it any more and destroys it once.
    drop(unsafe { Box::from_raw(channel.cast::<Channel<D>>()) });
}

extern "C" fn release<D: Device>(context: *mut c_void) {
    // SAFETY: made by `register`; the shim's last call of all.
    drop(unsafe { Box::from_raw(context.cast::<Context<D>>()) });
}

struct Table<D>(PhantomData<D>);
impl<D: Device> Table<D> {
    const OPS: spdk_sys::ps_device_ops = spdk_sys::ps_device_ops {
        submit: Some(submit::<D>),
        supports: Some(supports::<D>),
        channel_create: Some(channel_create::<D>),
        channel_destroy: Some(channel_destroy::<D>),
        release: Some(release::<D>),
    };
}

/// A registered device, for the app thread. Dropping this does not unregister it.
pub struct Registered {
    pointer: NonNull<spdk_sys::ps_device>,
    name: String,
}

/// Registers a device. App thread. `device` is dropped when SPDK has let go of it, after [`Registered::unregister`].
pub fn register<D: Device>(params: &DeviceParams, device: Arc<D>) -> Result<Registered, Errno> {
    thread::assert_app_thread("registering a device");
    if params.block_count == 0 || !params.block_size.is_power_of_two() || params.block_size < 512 {
        return Err(Errno::INVAL);
    }
    let name = c_string(&params.name)?;
    let product = c_string(&params.product)?;
    let c = spdk_sys::ps_device_params {
        name: name.as_ptr(),
        product: product.as_ptr(),
        uuid: params.uuid,
        block_count: params.block_count,
        block_size: params.block_size,
        nvme_nsid: params.nvme_nsid,
        compare_and_write_blocks: params.compare_and_write_blocks,
        nvmf_only: params.front_end.is_nvmf(),
    };
    let ops: &'static spdk_sys::ps_device_ops = &Table::<D>::OPS;
    let context = Box::into_raw(Box::new(Context { device, front_end: params.front_end }));
    let mut errno: c_int = 0;
    // SAFETY: on the app thread; the table is static, strings are copied, the context lives until `release`.
    let pointer = unsafe { spdk_sys::ps_device_register(&c, ops, context.cast(), &mut errno) };
    match NonNull::new(pointer) {
        Some(pointer) => Ok(Registered { pointer, name: params.name.clone() }),
        None => {
            // SAFETY: not registered, so never released.
            drop(unsafe { Box::from_raw(context) });
            Err(Errno::new(errno.abs()))
        }
    }
}

impl Registered {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Asks all users to let go; `done` when they have, on this thread. Waits for outstanding I/O without limit.
    pub fn unregister(self, done: impl FnOnce(Result<(), Errno>) + 'static) {
        thread::assert_app_thread("unregistering a device");
        callback::start(done, |arg| {
            // SAFETY: registered, and unregistered once since `self` is consumed.
            unsafe { spdk_sys::ps_device_unregister(self.pointer.as_ptr(), Some(callback::on_status), arg) };
            0
        });
    }

    /// A new size in blocks, also while open. Shrinking an open device is refused with BUSY.
    pub fn resize(&self, block_count: u64) -> Result<(), Errno> {
        thread::assert_app_thread("resizing a device");
        // SAFETY: registered until `unregister` consumes self.
        Errno::check(unsafe { spdk_sys::ps_device_resize(self.pointer.as_ptr(), block_count) })
    }
}

/// One command of a host. Complete it by value, once, on the thread it came to; dropped, it is answered with an internal error.
pub struct HostIo {
    /// Lies in SPDK's I/O, which lives until it is completed; nothing else changes it meanwhile.
    view: NonNull<spdk_sys::ps_io>,
}

/// Identifies a command for as long as it is not completed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct HostIoId(usize);

impl HostIo {
    #[inline]
    pub(crate) fn view(&self) -> &spdk_sys::ps_io {
        // SAFETY: live until completed, which takes the value; changed through `&mut self` alone.
        unsafe { self.view.as_ref() }
    }

    #[inline]
    pub(crate) fn view_mut(&mut self) -> &mut spdk_sys::ps_io {
        // SAFETY: as above.
        unsafe { self.view.as_mut() }
    }

    fn raw(&self) -> *mut spdk_sys::spdk_bdev_io {
        self.view().io
    }

    fn front_end(&self) -> FrontEnd {
        FrontEnd::from_c(self.view().front_end)
    }

    pub fn kind(&self) -> IoKind {
        IoKind::from_c(self.view().type_)
    }

    pub fn id(&self) -> HostIoId {
        HostIoId(self.raw() as usize)
    }

    /// For `Abort`: the command to abort, which may have been completed meanwhile.
    pub fn abort_target(&self) -> Option<HostIoId> {
        let target = self.view().abort_target;
        (!target.is_null()).then_some(HostIoId(target as usize))
    }

    /// First block; 0 for kinds without a range. Raw commands carry theirs in [`HostIo::command`].
    pub fn offset_blocks(&self) -> u64 {
        self.view().offset_blocks
    }

    pub fn block_count(&self) -> u64 {
        self.view().num_blocks
    }

    /// Force unit access was asked for.
    pub fn fua(&self) -> bool {
        self.view().fua
    }

    /// For raw commands: the submission queue entry.
    pub fn command(&self) -> Option<[u8; 64]> {
        let from = self.view().nvme_cmd.cast::<u8>();
        if from.is_null() {
            return None;
        }
        let mut command = [0u8; 64];
        // SAFETY: the command lies in the I/O, which lives until completed.
        unsafe { std::ptr::copy_nonoverlapping(from, command.as_mut_ptr(), 64) };
        Some(command)
    }

    /// Separate metadata of a raw command, if it brought any: (address is private) its length in bytes.
    pub fn metadata_len(&self) -> usize {
        if self.view().md_buf.is_null() { 0 } else { self.view().md_len }
    }

    /// Bytes of payload: what a write brings or a read wants.
    pub fn payload_len(&self) -> usize {
        self.view().payload_len
    }

    /// Whether nobody but us can write the payload until completion. If not, copy before checking anything.
    pub fn payload_is_private(&self) -> bool {
        matches!(self.front_end(), FrontEnd::NvmfNetwork | FrontEnd::InProcess)
    }

    /// Copies payload from byte `offset` on into `to`, which must be within it (panics otherwise).
    pub fn copy_out(&self, offset: usize, to: &mut [u8]) {
        assert!(offset.checked_add(to.len()).is_some_and(|end| end <= self.payload_len()), "payload of {} bytes", self.payload_len());
        // SAFETY: this I/O's vector, and the range lies inside.
        unsafe { gather(self.view().iovs, offset, to) };
    }

    /// What compare-and-write compares with, from byte `offset` on, into `to` (panics if out of range).
    pub fn copy_compare(&self, offset: usize, to: &mut [u8]) {
        let len: usize = self.all_iovs().0.iter().map(|iov| iov.iov_len).sum();
        assert!(offset.checked_add(to.len()).is_some_and(|end| end <= len), "compare data of {len} bytes");
        // SAFETY: as above.
        unsafe { gather(self.view().compare_iovs, offset, to) };
    }

    /// Fills payload from byte `offset` on, for reads. Panics if out of range.
    pub fn copy_in(&mut self, offset: usize, from: &[u8]) {
        assert!(offset.checked_add(from.len()).is_some_and(|end| end <= self.payload_len()), "payload of {} bytes", self.payload_len());
        let (mut skip, mut from) = (offset, from);
        let mut at = self.view().iovs;
        while !from.is_empty() {
            // SAFETY: the lengths add up to at least payload_len, checked above, so `at` stays inside the vector; the memory is
            // the host's for this command until it is completed. Raw copies, since a guest may write there at the same time.
            unsafe {
                let iov = &*at;
                if skip < iov.iov_len {
                    let len = (iov.iov_len - skip).min(from.len());
                    std::ptr::copy_nonoverlapping(from.as_ptr(), iov.iov_base.cast::<u8>().add(skip), len);
                    from = &from[len..];
                    skip = 0;
                } else {
                    skip -= iov.iov_len;
                }
                at = at.add(1);
            }
        }
    }

    /// Zeroes payload, for reads. Panics if out of range.
    pub fn zero_in(&mut self, offset: usize, len: usize) {
        const ZEROES: [u8; 4096] = [0; 4096];
        let mut done = 0;
        while done < len {
            let part = (len - done).min(ZEROES.len());
            self.copy_in(offset + done, &ZEROES[..part]);
            done += part;
        }
    }

    /// The payload's parts without a copy, where it is ours alone ([`HostIo::payload_is_private`]); None elsewhere.
    pub fn private_parts(&self) -> Option<impl Iterator<Item = &[u8]>> {
        if !self.payload_is_private() {
            return None;
        }
        // SAFETY: the target's own pool memory, initialised, which nobody writes until this command is completed; the borrow
        // of self keeps it from being completed.
        Some((0..self.view().iovcnt as usize).map(|at| unsafe {
            let iov = &*self.view().iovs.add(at);
            std::slice::from_raw_parts(iov.iov_base.cast::<u8>().cast_const(), iov.iov_len)
        }))
    }

    /// Who sent it, where it came over NVMe-oF. Costs some copying: for control and for the first command of an association.
    pub fn association(&self) -> Option<crate::nvmf::Association> {
        if !self.front_end().is_nvmf() {
            return None;
        }
        crate::nvmf::association_of(self.raw())
    }

    /// The controller it came through and whether its connection is still good. Cheap: for every command.
    pub fn controller(&self) -> Option<crate::nvmf::ControllerState> {
        if !self.front_end().is_nvmf() {
            return None;
        }
        crate::nvmf::controller_of(self.raw())
    }

    /// Both vectors in the order of the command's bytes: what to compare with, then the payload.
    pub(crate) fn all_iovs(&self) -> (&[spdk_sys::iovec], &[spdk_sys::iovec]) {
        let view = self.view();
        // SAFETY: the I/O's own vectors, which SPDK keeps until completion, which takes the value.
        unsafe { (vector(view.compare_iovs, view.compare_iovcnt), vector(view.iovs, view.iovcnt)) }
    }

    /// Answers the host. From inside `submit` this costs a message; later it does not. NVMe hosts are told not to retry where
    /// the status [is final](NvmeStatus::is_final).
    pub fn complete(self, status: Status) {
        let io = self.raw();
        let from_nvmf = self.front_end().is_nvmf();
        std::mem::forget(self);
        // SAFETY: live until now, completed once since `self` is gone, and on its own thread since HostIo is not Send. Devices
        // registered for an NVMe-oF front end get its I/O alone.
        unsafe {
            match status {
                Status::Success => spdk_sys::ps_io_complete_success(io, 0),
                Status::SuccessWith(cdw0) => spdk_sys::ps_io_complete_success(io, cdw0),
                Status::Nvme(status) if from_nvmf && status.is_final() => spdk_sys::ps_io_complete_nvmf_final(io, status.sct, status.sc),
                Status::Nvme(NvmeStatus { sct, sc }) => spdk_sys::ps_io_complete_nvme(io, 0, sct, sc),
                Status::Miscompare => spdk_sys::ps_io_complete_miscompare(io),
                Status::Aborted => spdk_sys::ps_io_complete_aborted(io),
            }
        }
    }
}

/// # Safety
/// `iovs` holds `count` entries for as long as the result is used, or `count` is 0.
unsafe fn vector<'a>(iovs: *const spdk_sys::iovec, count: u32) -> &'a [spdk_sys::iovec] {
    // SAFETY: the caller's promise.
    if count == 0 { &[] } else { unsafe { std::slice::from_raw_parts(iovs, count as usize) } }
}

/// # Safety
/// `iovs` is an I/O's vector that holds at least `offset + to.len()` bytes.
unsafe fn gather(iovs: *const spdk_sys::iovec, offset: usize, to: &mut [u8]) {
    let (mut skip, mut to) = (offset, to);
    let mut at = iovs;
    while !to.is_empty() {
        // SAFETY: the caller's promise keeps `at` inside. Raw copies, since a guest may write there at the same time.
        unsafe {
            let iov = &*at;
            if skip < iov.iov_len {
                let len = (iov.iov_len - skip).min(to.len());
                std::ptr::copy_nonoverlapping(iov.iov_base.cast::<u8>().cast_const().add(skip), to.as_mut_ptr(), len);
                to = &mut to[len..];
                skip = 0;
            } else {
                skip -= iov.iov_len;
            }
            at = at.add(1);
        }
    }
}

impl Drop for HostIo {
    fn drop(&mut self) {
        app::log_error(&format!("a {:?} of a host was dropped without an answer; answering internal device error", self.kind()));
        let NvmeStatus { sct, sc } = NvmeStatus::INTERNAL_DEVICE_ERROR;
        // SAFETY: not completed (`complete` forgets self), and on its own thread.
        unsafe { spdk_sys::ps_io_complete_nvme(self.raw(), 0, sct, sc) };
    }
}

impl std::fmt::Debug for HostIo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostIo({:?} {}+{} blocks, {} bytes)", self.kind(), self.offset_blocks(), self.block_count(), self.payload_len())
    }
}

// SAFETY: the host's memory for this command stays where it is until the command is completed, which takes the value. SPDK
// front ends hand out DMA-able memory. Others write there only where it is the guest's own, which no safe code reaches.
unsafe impl IoMemory for HostIo {
    fn ranges(&self, out: &mut Ranges<'_>) {
        let mut left = self.payload_len();
        for at in 0..self.view().iovcnt as usize {
            // SAFETY: inside this I/O's vector.
            let iov = unsafe { &*self.view().iovs.add(at) };
            let len = iov.iov_len.min(left);
            if len > 0 {
                out.push(iov.iov_base.cast(), len);
            }
            left -= len;
        }
    }
}
// SAFETY: as above; `private_parts` needs the value that the device's I/O then owns.
unsafe impl IoMemoryMut for HostIo {}

#[cfg(test)]
mod tests {
    use super::*;

    fn iov(bytes: &mut [u8]) -> spdk_sys::iovec {
        spdk_sys::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
    }

    #[test]
    fn gather_across_parts_from_any_offset_matches_the_flat_bytes() {
        let mut flat: Vec<u8> = (0..64).collect();
        let whole = flat.clone();
        let (a, rest) = flat.split_at_mut(7);
        let (b, c) = rest.split_at_mut(0);
        let parts = [iov(a), iov(b), iov(c)];
        for offset in 0..64 {
            for len in 0..=(64 - offset) {
                let mut out = vec![0xff; len];
                // SAFETY: the parts hold 64 bytes.
                unsafe { gather(parts.as_ptr(), offset, &mut out) };
                assert_eq!(out, whole[offset..offset + len]);
            }
        }
    }

    #[test]
    fn every_raw_kind_of_spdk_is_one_of_ours() {
        for kind in [spdk_sys::SPDK_BDEV_IO_TYPE_NVME_IO, spdk_sys::SPDK_BDEV_IO_TYPE_NVME_IO_MD, spdk_sys::SPDK_BDEV_IO_TYPE_NVME_IOV_MD] {
            assert_eq!(IoKind::from_c(kind as u8), IoKind::NvmeIo);
        }
        assert_eq!(IoKind::from_c(200), IoKind::Other(200));
    }
}
