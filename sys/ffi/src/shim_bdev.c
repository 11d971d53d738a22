/* The bdev client's view of a device, malloc bdevs and NVMe drives. See shim.h. */
#include "shim.h"
#include "spdk/bdev_module.h"
#include "spdk/uuid.h"
#include "bdev_malloc.h"
#include "bdev_nvme.h"

void
ps_bdev_geometry(struct spdk_bdev *bdev, struct ps_bdev_geometry *out)
{
	const struct spdk_uuid *uuid = spdk_bdev_get_uuid(bdev);

	memset(out, 0, sizeof(*out));
	out->block_count = spdk_bdev_get_num_blocks(bdev);
	out->block_size = spdk_bdev_get_block_size(bdev);
	out->physical_block_size = spdk_bdev_get_physical_block_size(bdev);
	out->optimal_io_boundary = spdk_bdev_get_optimal_io_boundary(bdev);
	out->buffer_alignment = spdk_bdev_get_buf_align(bdev);
	out->metadata_size = spdk_bdev_get_md_size(bdev);
	out->write_cache = spdk_bdev_has_write_cache(bdev);
	out->can_flush = spdk_bdev_io_type_supported(bdev, SPDK_BDEV_IO_TYPE_FLUSH);
	out->can_unmap = spdk_bdev_io_type_supported(bdev, SPDK_BDEV_IO_TYPE_UNMAP);
	out->can_write_zeroes = spdk_bdev_io_type_supported(bdev, SPDK_BDEV_IO_TYPE_WRITE_ZEROES);
	out->can_nvme_io = spdk_bdev_io_type_supported(bdev, SPDK_BDEV_IO_TYPE_NVME_IO);
	out->can_nvme_admin = spdk_bdev_io_type_supported(bdev, SPDK_BDEV_IO_TYPE_NVME_ADMIN);
	memcpy(out->uuid, uuid, 16);
}

void
ps_bdev_io_status(struct spdk_bdev_io *io, bool success, struct ps_nvme_status *out)
{
	int sct = 0, sc = 0;

	out->success = success;
	out->cdw0 = 0;
	spdk_bdev_io_get_nvme_status(io, &out->cdw0, &sct, &sc);
	out->sct = (uint8_t)sct;
	out->sc = (uint8_t)sc;
}

int
ps_bdev_nvme(struct spdk_bdev_desc *desc, struct spdk_io_channel *ch, bool admin, const void *cmd, void *buf,
	     size_t nbytes, spdk_bdev_io_completion_cb cb, void *arg)
{
	return admin ? spdk_bdev_nvme_admin_passthru(desc, ch, cmd, buf, nbytes, cb, arg)
	       : spdk_bdev_nvme_io_passthru(desc, ch, cmd, buf, nbytes, cb, arg);
}

int
ps_malloc_create(const char *name, const uint8_t uuid[16], uint64_t blocks, uint32_t block_size)
{
	struct malloc_bdev_opts opts = {};
	struct spdk_bdev *bdev = NULL;

	opts.name = (char *)name;
	memcpy(&opts.uuid, uuid, 16);
	opts.num_blocks = blocks;
	opts.block_size = block_size;
	opts.numa_id = SPDK_ENV_NUMA_ID_ANY;
	return create_malloc_disk(&bdev, &opts);
}

void
ps_malloc_delete(const char *name, ps_status_fn done, void *arg)
{
	delete_malloc_disk(name, done, arg);
}

int
ps_nvme_enable_flush(void)
{
	struct spdk_bdev_nvme_opts opts;

	opts.opts_size = sizeof(opts);
	spdk_bdev_nvme_get_opts(&opts, sizeof(opts));
	opts.enable_flush = true;
	return spdk_bdev_nvme_set_opts(&opts);
}

int
ps_nvme_poll_every(uint64_t period_us)
{
	struct spdk_bdev_nvme_opts opts;

	opts.opts_size = sizeof(opts);
	spdk_bdev_nvme_get_opts(&opts, sizeof(opts));
	opts.nvme_ioq_poll_period_us = period_us;
	return spdk_bdev_nvme_set_opts(&opts);
}

#define NVME_NAMES_MAX 128

struct nvme_attach {
	ps_nvme_attached_fn done;
	void *arg;
	struct spdk_nvme_ctrlr_opts driver;
	struct spdk_bdev_nvme_ctrlr_opts bdev;
	const char *names[NVME_NAMES_MAX];
};

static void
nvme_attached(void *arg, size_t count, int rc)
{
	struct nvme_attach *attach = arg;

	attach->done(attach->arg, attach->names, count, rc);
	free(attach);
}

int
ps_nvme_attach(const char *transport, const char *address, const char *service, const char *subsystem_nqn,
	       const char *base_name, ps_nvme_attached_fn done, void *arg)
{
	struct spdk_nvme_transport_id trid = {};
	struct nvme_attach *attach;
	int rc;

	if (spdk_nvme_transport_id_populate_trstring(&trid, transport) != 0 ||
	    spdk_nvme_transport_id_parse_trtype(&trid.trtype, transport) != 0) {
		return -EINVAL;
	}
	if (strlen(address) >= sizeof(trid.traddr) || strlen(service) >= sizeof(trid.trsvcid) ||
	    strlen(subsystem_nqn) >= sizeof(trid.subnqn)) {
		return -ENAMETOOLONG;
	}
	strcpy(trid.traddr, address);
	strcpy(trid.trsvcid, service);
	strcpy(trid.subnqn, subsystem_nqn);
	if (trid.trtype == SPDK_NVME_TRANSPORT_TCP) {
		trid.adrfam = strchr(address, ':') != NULL ? SPDK_NVMF_ADRFAM_IPV6 : SPDK_NVMF_ADRFAM_IPV4;
	}
	attach = calloc(1, sizeof(*attach));
	if (attach == NULL) {
		return -ENOMEM;
	}
	attach->done = done;
	attach->arg = arg;
	spdk_nvme_ctrlr_get_default_ctrlr_opts(&attach->driver, sizeof(attach->driver));
	spdk_bdev_nvme_get_default_ctrlr_opts(&attach->bdev);
	attach->bdev.multipath = false;
	rc = spdk_bdev_nvme_create(&trid, base_name, attach->names, NVME_NAMES_MAX, nvme_attached, attach,
				   &attach->driver, &attach->bdev);
	if (rc != 0) {
		free(attach);
	}
	return rc;
}

int
ps_nvme_detach(const char *base_name, ps_status_fn done, void *arg)
{
	const struct spdk_nvme_path_id any_path = {};

	return spdk_bdev_nvme_delete(base_name, &any_path, done, arg);
}
