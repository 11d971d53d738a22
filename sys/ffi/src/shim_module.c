/* The bdev module `penstock`: forwards to Rust through a table of functions per device. See shim.h. */
#include "shim.h"
#include "spdk/bdev_module.h"
#include "spdk/util.h"

struct ps_device {
	struct spdk_bdev bdev;
	const struct ps_device_ops *ops;
	void *ctx;
	bool nvmf_only;
};

/* What each thread's I/O channel holds. */
struct ps_channel {
	const struct ps_device_ops *ops;
	void *channel;
};

static int
module_init(void)
{
	return 0;
}

static int
ctx_size(void)
{
	return sizeof(struct ps_io);
}

static struct spdk_bdev_module g_module = {
	.name = "penstock",
	.module_init = module_init,
	.get_ctx_size = ctx_size,
};
SPDK_BDEV_MODULE_REGISTER(penstock, &g_module)

static int
channel_create(void *io_device, void *ctx)
{
	struct ps_device *device = io_device;
	struct ps_channel *channel = ctx;

	channel->ops = device->ops;
	channel->channel = device->ops->channel_create(device->ctx);
	return channel->channel == NULL ? -ENOMEM : 0;
}

static void
channel_destroy(void *io_device, void *ctx)
{
	struct ps_device *device = io_device;
	struct ps_channel *channel = ctx;

	device->ops->channel_destroy(device->ctx, channel->channel);
}

static void
device_gone(void *io_device)
{
	struct ps_device *device = io_device;

	spdk_bdev_destruct_done(&device->bdev, 0);
	device->ops->release(device->ctx);
	free(device->bdev.name);
	free(device->bdev.product_name);
	free(device);
}

static int
device_destruct(void *ctx)
{
	/* Channels may still be closing on other threads; device_gone runs after the last. */
	spdk_io_device_unregister(ctx, device_gone);
	return 1;
}

static size_t
total(const struct iovec *iovs, uint32_t count)
{
	size_t len = 0;

	for (uint32_t i = 0; i < count; i++) {
		len += iovs[i].iov_len;
	}
	return len;
}

/* The view lies in the I/O itself, so what holds a command is one pointer. */
static void
submit(struct ps_channel *channel, struct spdk_bdev_io *io)
{
	struct ps_io *view = (struct ps_io *)io->driver_ctx;

	memset(view, 0, sizeof(*view));
	view->io = io;
	view->type = io->type;
	switch (io->type) {
	case SPDK_BDEV_IO_TYPE_NVME_ADMIN:
	case SPDK_BDEV_IO_TYPE_NVME_IO:
	case SPDK_BDEV_IO_TYPE_NVME_IO_MD:
	case SPDK_BDEV_IO_TYPE_NVME_IOV_MD:
		if (io->u.nvme_passthru.iovcnt == 0 && io->u.nvme_passthru.nbytes > 0) {
			/* The flat-buffer calls leave the vector empty. */
			io->iov.iov_base = io->u.nvme_passthru.buf;
			io->iov.iov_len = io->u.nvme_passthru.nbytes;
			view->iovs = &io->iov;
			view->iovcnt = 1;
		} else {
			view->iovs = io->u.nvme_passthru.iovs;
			view->iovcnt = spdk_max(io->u.nvme_passthru.iovcnt, 0);
		}
		view->payload_len = total(view->iovs, view->iovcnt);
		if (io->u.nvme_passthru.nbytes > 0) {
			view->payload_len = spdk_min(view->payload_len, io->u.nvme_passthru.nbytes);
		}
		view->nvme_cmd = &io->u.nvme_passthru.cmd;
		view->md_buf = io->u.nvme_passthru.md_buf;
		view->md_len = io->u.nvme_passthru.md_len;
		break;
	case SPDK_BDEV_IO_TYPE_RESET:
		break;
	case SPDK_BDEV_IO_TYPE_ABORT:
		view->abort_target = io->u.abort.bio_to_abort;
		break;
	case SPDK_BDEV_IO_TYPE_COMPARE_AND_WRITE:
		view->compare_iovs = io->u.bdev.iovs;
		view->compare_iovcnt = spdk_max(io->u.bdev.iovcnt, 0);
		view->iovs = io->u.bdev.fused_iovs;
		view->iovcnt = spdk_max(io->u.bdev.fused_iovcnt, 0);
		goto ranged;
	default:
		view->iovs = io->u.bdev.iovs;
		view->iovcnt = spdk_max(io->u.bdev.iovcnt, 0);
ranged:
		view->payload_len = total(view->iovs, view->iovcnt);
		view->offset_blocks = io->u.bdev.offset_blocks;
		view->num_blocks = io->u.bdev.num_blocks;
		view->md_buf = io->u.bdev.md_buf;
		view->fua = (io->u.bdev.nvme_cdw12.raw & (1u << 30)) != 0;
		break;
	}
	channel->ops->submit(channel->channel, view);
}

static void
got_buffer(struct spdk_io_channel *ch, struct spdk_bdev_io *io, bool success)
{
	if (!success) {
		spdk_bdev_io_complete(io, SPDK_BDEV_IO_STATUS_NOMEM);
		return;
	}
	submit(spdk_io_channel_get_ctx(ch), io);
}

static void
submit_request(struct spdk_io_channel *ch, struct spdk_bdev_io *io)
{
	/* A reader may leave it to the device to bring the buffer. */
	if (spdk_unlikely(io->type == SPDK_BDEV_IO_TYPE_READ &&
			  (io->u.bdev.iovs == NULL || io->u.bdev.iovs[0].iov_base == NULL))) {
		spdk_bdev_io_get_buf(io, got_buffer, io->u.bdev.num_blocks * io->bdev->blocklen);
		return;
	}
	submit(spdk_io_channel_get_ctx(ch), io);
}

static bool
io_type_supported(void *ctx, enum spdk_bdev_io_type type)
{
	struct ps_device *device = ctx;

	return device->ops->supports(device->ctx, (uint8_t)type);
}

static struct spdk_io_channel *
get_io_channel(void *ctx)
{
	return spdk_get_io_channel(ctx);
}

static const struct spdk_bdev_fn_table g_functions = {
	.destruct = device_destruct,
	.submit_request = submit_request,
	.io_type_supported = io_type_supported,
	.get_io_channel = get_io_channel,
};

struct ps_device *
ps_device_register(const struct ps_device_params *params, const struct ps_device_ops *ops, void *ctx, int *err)
{
	struct ps_device *device = calloc(1, sizeof(*device));

	*err = -ENOMEM;
	if (device == NULL) {
		return NULL;
	}
	device->ops = ops;
	device->ctx = ctx;
	device->nvmf_only = params->nvmf_only;
	device->bdev.ctxt = device;
	device->bdev.name = strdup(params->name);
	device->bdev.product_name = strdup(params->product);
	if (device->bdev.name == NULL || device->bdev.product_name == NULL) {
		goto fail;
	}
	memcpy(&device->bdev.uuid, params->uuid, 16);
	device->bdev.blockcnt = params->block_count;
	device->bdev.blocklen = params->block_size;
	device->bdev.nsid = params->nvme_nsid;
	device->bdev.acwu = params->compare_and_write_blocks;
	/* No alignment, boundary, segment or size limits: each makes SPDK split a command in two. */
	device->bdev.fn_table = &g_functions;
	device->bdev.module = &g_module;

	spdk_io_device_register(device, channel_create, channel_destroy, sizeof(struct ps_channel), params->name);
	*err = spdk_bdev_register(&device->bdev);
	if (*err == 0) {
		return device;
	}
	spdk_io_device_unregister(device, NULL);
fail:
	free(device->bdev.name);
	free(device->bdev.product_name);
	free(device);
	return NULL;
}

bool
ps_bdev_is_nvmf_only(const struct spdk_bdev *bdev)
{
	return bdev->module == &g_module && SPDK_CONTAINEROF(bdev, struct ps_device, bdev)->nvmf_only;
}

void
ps_device_unregister(struct ps_device *device, ps_status_fn done, void *arg)
{
	spdk_bdev_unregister(&device->bdev, done, arg);
}

int
ps_device_resize(struct ps_device *device, uint64_t block_count)
{
	return spdk_bdev_notify_blockcnt_change(&device->bdev, block_count);
}

void
ps_io_complete_success(struct spdk_bdev_io *io, uint32_t cdw0)
{
	if (spdk_unlikely(cdw0 != 0)) {
		spdk_bdev_io_complete_nvme_status(io, cdw0, 0, 0);
		return;
	}
	spdk_bdev_io_complete(io, SPDK_BDEV_IO_STATUS_SUCCESS);
}

void
ps_io_complete_nvme(struct spdk_bdev_io *io, uint32_t cdw0, uint8_t sct, uint8_t sc)
{
	spdk_bdev_io_complete_nvme_status(io, cdw0, sct, sc);
}

void
ps_io_complete_miscompare(struct spdk_bdev_io *io)
{
	spdk_bdev_io_complete(io, SPDK_BDEV_IO_STATUS_MISCOMPARE);
}

void
ps_io_complete_aborted(struct spdk_bdev_io *io)
{
	spdk_bdev_io_complete(io, SPDK_BDEV_IO_STATUS_ABORTED);
}
