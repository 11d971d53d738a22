/* What Rust cannot reach through bindgen alone: static inlines, structures whose layout differs between SPDK
 * trees (upstream's and Ceph's fork), variadic callbacks, and the few fields SPDK keeps private. Every function
 * here is a few lines; decisions belong to Rust. Callbacks run on the SPDK thread named beside them. */
#ifndef PENSTOCK_SHIM_H
#define PENSTOCK_SHIM_H

#include "spdk/stdinc.h"
#include "spdk/bdev.h"
#include "spdk/env.h"
#include "spdk/json.h"
#include "spdk/jsonrpc.h"
#include "spdk/log.h"
#include "spdk/nvmf.h"
#include "spdk/rpc.h"
#include "spdk/sock.h"
#include "spdk/thread.h"
#include "spdk/vhost.h"

/* ---- app (shim_app.c) ---- */
typedef void (*ps_fn)(void *arg);
typedef void (*ps_status_fn)(void *arg, int status);
/* Any native thread. level is enum spdk_log_level; msg has no trailing newline. */
typedef void (*ps_log_fn)(int level, const char *file, int line, const char *msg, size_t len);

struct ps_app_opts {
	const char *name;
	const char *core_mask;		/* "0x3" or "[0,1]" */
	const char *rpc_addr;		/* NULL: no RPC server */
	const void *json;		/* NULL: no configuration */
	size_t json_len;
	int mem_mib;			/* 0: SPDK's default */
	int main_core;			/* -1: the first of the mask */
	bool no_huge;
	bool no_pci;
	bool interrupt_mode;
	bool lock_cores;
	bool single_file_segments;
	bool in_memory;			/* hugepages as files without names */
	int log_level;
	ps_log_fn log;			/* NULL: SPDK's own */
	void (*on_shutdown)(void);	/* app thread: something in SPDK asks the app to stop */
};
/* Blocks until ps_app_stop; start runs on the app thread. Returns what ps_app_stop was given, or a failure. */
int ps_app_run(const struct ps_app_opts *opts, ps_fn start, void *arg);
void ps_app_stop(int code);
uint32_t ps_core_count(void);
uint32_t ps_first_core(void);
uint32_t ps_next_core(uint32_t core);	/* UINT32_MAX after the last */
uint32_t ps_current_core(void);		/* UINT32_MAX outside a reactor */
/* Time stamp counter ticks that the core's reactor spent on work and on finding none. False: not a reactor. */
bool ps_reactor_ticks(uint32_t core, uint64_t *busy, uint64_t *idle);
/* A thread that only ever runs on this core. */
struct spdk_thread *ps_thread_create(const char *name, uint32_t core);
void ps_poller_mark_event_driven(struct spdk_poller *poller);

/* ---- bdev client (shim_bdev.c) ---- */
struct ps_bdev_geometry {
	uint64_t block_count;
	uint32_t block_size;
	uint32_t physical_block_size;
	uint32_t optimal_io_boundary;	/* blocks, 0: none */
	uint32_t buffer_alignment;	/* bytes */
	uint32_t metadata_size;		/* bytes a block */
	bool write_cache;
	bool can_flush, can_unmap, can_write_zeroes, can_nvme_io, can_nvme_admin;
	uint8_t uuid[16];
};
void ps_bdev_geometry(struct spdk_bdev *bdev, struct ps_bdev_geometry *out);
struct ps_nvme_status {
	bool success;
	uint8_t sct, sc;
	uint32_t cdw0;
};
void ps_bdev_io_status(struct spdk_bdev_io *io, bool success, struct ps_nvme_status *out);
/* cmd is 64 bytes and copied. */
int ps_bdev_nvme(struct spdk_bdev_desc *desc, struct spdk_io_channel *ch, bool admin, const void *cmd, void *buf,
		 size_t nbytes, spdk_bdev_io_completion_cb cb, void *arg);
int ps_malloc_create(const char *name, const uint8_t uuid[16], uint64_t blocks, uint32_t block_size);
void ps_malloc_delete(const char *name, ps_status_fn done, void *arg);

/* ---- NVMe drives as bdevs (shim_bdev.c); app thread ---- */
/* Makes flushes reach drives; SPDK's default answers them itself. Before the first attach. */
int ps_nvme_enable_flush(void);
int ps_nvme_poll_every(uint64_t period_us);
/* The names are valid during the call. */
typedef void (*ps_nvme_attached_fn)(void *arg, const char *const *names, size_t count, int rc);
int ps_nvme_attach(const char *transport, const char *address, const char *service, const char *subsystem_nqn,
		   const char *base_name, ps_nvme_attached_fn done, void *arg);
int ps_nvme_detach(const char *base_name, ps_status_fn done, void *arg);

/* ---- bdev module (shim_module.c) ---- */
struct ps_io {
	struct spdk_bdev_io *io;
	struct iovec *iovs;		/* the payload: what a write brings, or a read fills */
	struct iovec *compare_iovs;	/* COMPARE_AND_WRITE: what to compare with */
	uint32_t iovcnt;
	uint32_t compare_iovcnt;
	size_t payload_len;
	uint64_t offset_blocks;
	uint64_t num_blocks;
	const void *nvme_cmd;		/* 64 bytes, for raw NVMe commands */
	void *md_buf;
	size_t md_len;
	struct spdk_bdev_io *abort_target;
	uint8_t type;			/* enum spdk_bdev_io_type */
	bool fua;
	/* For the other side's own use. */
	uint8_t front_end;
	uint32_t home;
	struct spdk_thread *owner;
};
struct ps_device_ops {
	void (*submit)(void *channel, struct ps_io *io);	/* the channel's thread; `io` stands until it is completed */
	bool (*supports)(void *ctx, uint8_t type);			/* any thread */
	void *(*channel_create)(void *ctx);				/* the channel's thread; NULL: failed */
	void (*channel_destroy)(void *ctx, void *channel);		/* the channel's thread */
	void (*release)(void *ctx);					/* app thread; last call of all */
};
struct ps_device_params {
	const char *name;
	const char *product;
	uint8_t uuid[16];
	uint64_t block_count;
	uint32_t block_size;
	uint32_t nvme_nsid;		/* nonzero: can sit in a passthrough subsystem */
	uint16_t compare_and_write_blocks;
	bool nvmf_only;			/* its I/O is taken for the NVMe-oF target's, so nobody else may open it */
};
struct ps_device;
bool ps_bdev_is_nvmf_only(const struct spdk_bdev *bdev);
/* App thread. On failure returns NULL, sets err to a negative errno, and never calls release. */
struct ps_device *ps_device_register(const struct ps_device_params *params, const struct ps_device_ops *ops,
				     void *ctx, int *err);
void ps_device_unregister(struct ps_device *device, ps_status_fn done, void *arg);
int ps_device_resize(struct ps_device *device, uint64_t block_count);
void ps_io_complete_success(struct spdk_bdev_io *io, uint32_t cdw0);
void ps_io_complete_nvme(struct spdk_bdev_io *io, uint32_t cdw0, uint8_t sct, uint8_t sc);
/* As above for an I/O of the NVMe-oF target, telling the host not to try again. */
void ps_io_complete_nvmf_final(struct spdk_bdev_io *io, uint8_t sct, uint8_t sc);
void ps_io_complete_miscompare(struct spdk_bdev_io *io);
void ps_io_complete_aborted(struct spdk_bdev_io *io);

/* ---- nvmf (shim_nvmf.c) ---- */
struct ps_association {
	char host_nqn[224];
	char subsystem_nqn[224];
	uint8_t host_id[16];
	uint16_t cntlid;
	uint16_t qid;
	bool live;			/* the connection is up and the controller enabled */
	const void *ctrlr;		/* identity only, valid while its qpairs live */
	char listen_addr[257];
	char listen_service[33];
};
/* io must have come from the NVMe-oF target, unsplit. */
int ps_io_association(struct spdk_bdev_io *io, struct ps_association *out);
/* host_id: 16 bytes, zeros for a host that gave none. */
const void *ps_io_controller(struct spdk_bdev_io *io, bool *live, uint8_t *host_id);

enum ps_identify_kind { PS_IDENTIFY_NAMESPACE = 0, PS_IDENTIFY_CONTROLLER = 1 };
/* The poll group's thread; data is 4096 bytes that the target filled in. */
typedef void (*ps_identify_fn)(enum ps_identify_kind kind, const struct ps_association *who, uint32_t nsid,
			       uint8_t *data);
void ps_nvmf_set_identify_hook(ps_identify_fn fn);

struct ps_transport_opts {
	uint32_t io_unit_size;		/* 0 in any field: the transport's default */
	uint32_t max_io_size;
	uint32_t in_capsule_data_size;
	uint32_t max_queue_depth;
	uint32_t max_qpairs_per_ctrlr;
	uint32_t num_shared_buffers;
	uint32_t buf_cache_size;
	uint32_t abort_timeout_s;
	uint32_t acceptor_poll_us;
	bool mask_copy;			/* SPDK emulates it and so advertises it */
	bool disable_mappable_bar0;	/* vfio-user: needed in interrupt mode */
};
int ps_nvmf_transport_add(struct spdk_nvmf_tgt *tgt, const char *name, const struct ps_transport_opts *opts,
			  ps_status_fn done, void *arg);
struct spdk_nvmf_subsystem *ps_nvmf_subsystem_create(struct spdk_nvmf_tgt *tgt, const char *nqn,
		uint32_t max_namespaces, bool passthrough);
struct ps_listen {
	const char *transport;		/* "TCP" or "VFIOUSER" */
	const char *address;		/* IP address, or vfio-user directory */
	const char *service;		/* port, or "0" */
	int ana_state;			/* enum spdk_nvme_ana_state */
};
int ps_nvmf_tgt_listen(struct spdk_nvmf_tgt *tgt, const struct ps_listen *listen);
int ps_nvmf_tgt_stop_listen(struct spdk_nvmf_tgt *tgt, const struct ps_listen *listen);
int ps_nvmf_add_listener(struct spdk_nvmf_subsystem *subsystem, const struct ps_listen *listen,
			 ps_status_fn done, void *arg);
int ps_nvmf_remove_listener(struct spdk_nvmf_tgt *tgt, struct spdk_nvmf_subsystem *subsystem,
			    const struct ps_listen *listen, ps_status_fn done, void *arg);
int ps_nvmf_set_ana_state(struct spdk_nvmf_subsystem *subsystem, const struct ps_listen *listen,
			  uint32_t anagrpid, ps_status_fn done, void *arg);
/* Returns the nsid, 0 on failure. */
uint32_t ps_nvmf_add_ns(struct spdk_nvmf_subsystem *subsystem, const char *bdev, uint32_t nsid,
			const uint8_t nguid[16], const uint8_t uuid[16], uint32_t anagrpid);
/* Starts to end every association with the subsystem. done says that each has been told, not that it is gone. */
int ps_nvmf_disconnect_all(struct spdk_nvmf_subsystem *subsystem, ps_status_fn done, void *arg);

/* Calls sink with the host NQN of each association. App thread. */
void ps_nvmf_hosts(struct spdk_nvmf_subsystem *subsystem, void (*sink)(void *arg, const char *host_nqn), void *arg);

/* ---- vhost (shim_vhost.c) ---- */
int ps_vhost_blk_create(const char *name, const char *cpumask, const char *bdev, bool readonly, bool packed_ring);
int ps_vhost_remove(const char *name);
int ps_vhost_sessions(const char *name);	/* guests connected; negative errno on failure */

/* ---- sock (shim_app.c) ---- */
/* Bytes that a write's request with so many ranges takes; aligned as malloc aligns. */
size_t ps_sock_request_size(int ranges);
/* Queues a write. request must stay until done, which gets 0 or a negative errno; the ranges are copied, not what they hold. */
void ps_sock_write(struct spdk_sock *sock, void *request, const struct iovec *ranges, int count, ps_status_fn done,
		   void *arg);
/* timeout_ms 0: the system's. done is called only where this returns a socket, perhaps before it does. */
struct spdk_sock *ps_sock_connect(const char *ip, int port, uint32_t timeout_ms, ps_status_fn done, void *arg);
int ps_sock_local_port(struct spdk_sock *sock);	/* negative errno on failure */

/* ---- JSON-RPC (shim_rpc.c) ---- */
#define PS_RPC_METHODS_MAX 64
/* App thread; slot is what ps_rpc_register returned; params is NULL where the request has none. */
typedef void (*ps_rpc_fn)(int slot, struct spdk_jsonrpc_request *request, const struct spdk_json_val *params);
/* Before the app starts. name must live for ever. Negative errno on failure. */
int ps_rpc_register(const char *name, ps_rpc_fn dispatch);
typedef int (*ps_json_sink)(void *sink, const void *data, size_t size);
int ps_json_text(const struct spdk_json_val *val, ps_json_sink write, void *sink);
void ps_rpc_result(struct spdk_jsonrpc_request *request, const void *json, size_t len);
/* data is JSON, or NULL. */
void ps_rpc_error(struct spdk_jsonrpc_request *request, int code, const char *msg, const void *data, size_t len);

#endif
