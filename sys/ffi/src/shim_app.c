/* The app, its threads and sockets. See shim.h. */
#include "shim.h"
#include "spdk/cpuset.h"
#include "spdk/event.h"
#include "spdk/string.h"
#include "spdk_internal/event.h"

static ps_log_fn g_log;
/* DPDK's vhost keeps a thread of its own that is never joined and polls a table in DPDK's memory. */
bool g_vhost_used;

static void
log_line(int level, const char *file, const int line, const char *func, const char *format, va_list args)
{
	char text[1024];
	int len;

	(void)func;
	len = vsnprintf(text, sizeof(text), format, args);
	if (len < 0) {
		return;
	}
	if ((size_t)len >= sizeof(text)) {
		len = sizeof(text) - 1;
	}
	while (len > 0 && (text[len - 1] == '\n' || text[len - 1] == '\r')) {
		len--;
	}
	g_log(level, file, line, text, (size_t)len);
}

/* exit() calls this before any destructor. */
static void
leave_before_destructors(int status, void *arg)
{
	(void)arg;
	fflush(NULL);
	_exit(status);
}

int
ps_app_run(const struct ps_app_opts *o, ps_fn start, void *arg)
{
	struct spdk_app_opts opts = {};
	int rc;

	spdk_app_opts_init(&opts, sizeof(opts));
	opts.name = o->name;
	opts.reactor_mask = o->core_mask;
	opts.rpc_addr = o->rpc_addr;
	opts.json_data = (void *)o->json;
	opts.json_data_size = o->json_len;
	if (o->mem_mib > 0) {
		opts.mem_size = o->mem_mib;
	}
	opts.main_core = o->main_core;
	opts.no_huge = o->no_huge;
	opts.no_pci = o->no_pci;
	opts.hugepage_single_segments = o->single_file_segments;
	if (o->in_memory) {
		/* SPDK unlinks hugepage files by itself, but not where there is to be one for many pages: DPDK refuses that, and takes this. */
		opts.env_context = (void *)"--in-memory";
	}
	opts.interrupt_mode = o->interrupt_mode;
	opts.disable_cpumask_locks = !o->lock_cores;
	opts.disable_signal_handlers = true;
	/* SPDK would lift the limit on core files, and one holds all of the DMA memory: the limit is the operator's. */
	opts.enable_coredump = false;
	opts.print_level = (enum spdk_log_level)o->log_level;
	opts.shutdown_cb = o->on_shutdown;
	/* Trace buffers are a file in /dev/shm for each process, for a facility that we do not use. */
	opts.num_entries = 0;
	if (o->log != NULL) {
		g_log = o->log;
		opts.log = log_line;
		/* SPDK opens it again later; this catches what the environment says first. */
		spdk_log_open(log_line);
	}
	spdk_log_set_level((enum spdk_log_level)o->log_level);
	rc = spdk_app_start(&opts, start, arg);
	if (!g_vhost_used) {
		/* Unmaps all of DPDK's memory: under that thread it would be a crash (seen). The process ends soon anyhow. */
		spdk_app_fini();
	} else {
		/* A destructor of SPDK's does the same at exit, with the same crash (seen). */
		on_exit(leave_before_destructors, NULL);
	}
	return rc;
}

void
ps_app_stop(int code)
{
	spdk_app_stop(code);
}

uint32_t
ps_core_count(void)
{
	return spdk_env_get_core_count();
}

uint32_t
ps_first_core(void)
{
	return spdk_env_get_first_core();
}

uint32_t
ps_next_core(uint32_t core)
{
	return spdk_env_get_next_core(core);
}

uint32_t
ps_current_core(void)
{
	return spdk_env_get_current_core();
}

struct spdk_thread *
ps_thread_create(const char *name, uint32_t core)
{
	struct spdk_cpuset mask;

	spdk_cpuset_zero(&mask);
	spdk_cpuset_set_cpu(&mask, core, true);
	return spdk_thread_create(name, &mask);
}

static void
stay_asleep(struct spdk_poller *poller, void *arg, bool interrupt_mode)
{
	(void)poller;
	(void)arg;
	(void)interrupt_mode;
}

void
ps_poller_mark_event_driven(struct spdk_poller *poller)
{
	spdk_poller_register_interrupt(poller, stay_asleep, NULL);
}

bool
ps_reactor_ticks(uint32_t core, uint64_t *busy, uint64_t *idle)
{
	const struct spdk_reactor *reactor = spdk_reactor_get(core);

	if (reactor == NULL) {
		return false;
	}
	*busy = reactor->busy_tsc;
	*idle = reactor->idle_tsc;
	return true;
}

size_t
ps_sock_request_size(int ranges)
{
	return sizeof(struct spdk_sock_request) + (size_t)ranges * sizeof(struct iovec);
}

void
ps_sock_write(struct spdk_sock *sock, void *request, const struct iovec *ranges, int count, ps_status_fn done,
	      void *arg)
{
	struct spdk_sock_request *req = request;

	memset(req, 0, sizeof(*req));
	req->cb_fn = done;
	req->cb_arg = arg;
	req->iovcnt = count;
	memcpy(SPDK_SOCK_REQUEST_IOV(req, 0), ranges, (size_t)count * sizeof(*ranges));
	spdk_sock_writev_async(sock, req);
}

struct spdk_sock *
ps_sock_connect(const char *ip, int port, uint32_t timeout_ms, ps_status_fn done, void *arg)
{
	struct spdk_sock_opts opts;

	opts.opts_size = sizeof(opts);
	spdk_sock_get_default_opts(&opts);
	opts.connect_timeout = timeout_ms;
	return spdk_sock_connect_async(ip, port, NULL, &opts, done, arg);
}

int
ps_sock_local_port(struct spdk_sock *sock)
{
	char local[64];
	uint16_t local_port = 0;

	if (spdk_sock_getaddr(sock, local, sizeof(local), &local_port, NULL, 0, NULL) != 0) {
		return -EIO;
	}
	return local_port;
}
