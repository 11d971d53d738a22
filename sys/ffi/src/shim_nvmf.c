/* The NVMe-oF target: transports, subsystems, listeners, and who sent a command. Some of what we need (passthrough,
 * the host's identity) SPDK keeps in nvmf_internal.h, hence the include. See shim.h. */
#include "shim.h"
#include "spdk/bdev_module.h"
#include "spdk/nvmf_cmd.h"
#include "spdk/nvmf_transport.h"
#include "spdk/string.h"
#include "spdk/util.h"
#include "nvmf_internal.h"

static ps_identify_fn g_identify;

static int
make_trid(const struct ps_listen *listen, struct spdk_nvme_transport_id *trid)
{
	memset(trid, 0, sizeof(*trid));
	if (spdk_nvme_transport_id_populate_trstring(trid, listen->transport) != 0 ||
	    spdk_nvme_transport_id_parse_trtype(&trid->trtype, listen->transport) != 0) {
		return -EINVAL;
	}
	if (trid->trtype == SPDK_NVME_TRANSPORT_TCP) {
		trid->adrfam = strchr(listen->address, ':') != NULL ? SPDK_NVMF_ADRFAM_IPV6 : SPDK_NVMF_ADRFAM_IPV4;
	}
	if (strlen(listen->address) > SPDK_NVMF_TRADDR_MAX_LEN ||
	    strlen(listen->service) > SPDK_NVMF_TRSVCID_MAX_LEN) {
		return -ENAMETOOLONG;
	}
	snprintf(trid->traddr, sizeof(trid->traddr), "%s", listen->address);
	snprintf(trid->trsvcid, sizeof(trid->trsvcid), "%s", listen->service);
	return 0;
}

/* ---- identity ---- */

static bool
is_live(const struct spdk_nvmf_qpair *qpair)
{
	return qpair->state == SPDK_NVMF_QPAIR_ENABLED && qpair->ctrlr->vcprop.cc.bits.en == 1;
}

static void
describe(struct spdk_nvmf_request *req, struct ps_association *out)
{
	struct spdk_nvmf_qpair *qpair = req->qpair;
	struct spdk_nvmf_ctrlr *ctrlr = qpair->ctrlr;
	const struct spdk_nvmf_subsystem_listener *listener = ctrlr->listener;

	memset(out, 0, sizeof(*out));
	snprintf(out->host_nqn, sizeof(out->host_nqn), "%s", ctrlr->hostnqn);
	snprintf(out->subsystem_nqn, sizeof(out->subsystem_nqn), "%s", ctrlr->subsys->subnqn);
	memcpy(out->host_id, &ctrlr->hostid, 16);
	out->cntlid = ctrlr->cntlid;
	out->qid = qpair->qid;
	out->live = is_live(qpair);
	out->ctrlr = ctrlr;
	if (listener != NULL && listener->trid != NULL) {
		snprintf(out->listen_addr, sizeof(out->listen_addr), "%s", listener->trid->traddr);
		snprintf(out->listen_service, sizeof(out->listen_service), "%s", listener->trid->trsvcid);
	}
}

int
ps_io_association(struct spdk_bdev_io *io, struct ps_association *out)
{
	struct spdk_nvmf_request *req = spdk_bdev_io_get_cb_arg(io);

	if (req == NULL || req->qpair == NULL || req->qpair->ctrlr == NULL) {
		return -ENOTCONN;
	}
	describe(req, out);
	return 0;
}

const void *
ps_io_controller(struct spdk_bdev_io *io, bool *live, uint8_t *host_id)
{
	struct spdk_nvmf_request *req = spdk_bdev_io_get_cb_arg(io);

	if (req == NULL || req->qpair == NULL || req->qpair->ctrlr == NULL) {
		return NULL;
	}
	*live = is_live(req->qpair);
	memcpy(host_id, &req->qpair->ctrlr->hostid, 16);
	return req->qpair->ctrlr;
}

void
ps_io_complete_nvmf_final(struct spdk_bdev_io *io, uint8_t sct, uint8_t sc)
{
	struct spdk_nvmf_request *req = spdk_bdev_io_get_cb_arg(io);

	/* The bdev layer has no place for this bit; the target fills in the rest of the status around it. */
	if (req != NULL && req->rsp != NULL) {
		req->rsp->nvme_cpl.status.dnr = 1;
	}
	spdk_bdev_io_complete_nvme_status(io, 0, sct, sc);
}

/* ---- identify ---- */

struct id_list {
	uint8_t *at;
	size_t left;
};

static void
append_id(struct id_list *list, uint8_t type, const void *id, uint8_t len)
{
	struct spdk_nvme_ns_id_desc *desc = (void *)list->at;

	if (spdk_mem_all_zero(id, len) || list->left < sizeof(*desc) + len) {
		return;
	}
	desc->nidt = type;
	desc->nidl = len;
	memcpy(desc->nid, id, len);
	list->at += sizeof(*desc) + len;
	list->left -= sizeof(*desc) + len;
}

/* SPDK does not export its own; without this a passthrough subsystem hands the command to the bdev. */
static int
identify_id_list(struct spdk_nvmf_ctrlr *ctrlr, struct spdk_nvme_cmd *cmd, struct spdk_nvme_cpl *rsp, uint8_t *data)
{
	struct spdk_nvmf_ns *ns = nvmf_ctrlr_get_ns(ctrlr, cmd->nsid);
	struct id_list list = { .at = data, .left = SPDK_NVME_IDENTIFY_BUFLEN };
	struct spdk_nvmf_ns_opts opts;

	if (ns == NULL) {
		rsp->status.sct = SPDK_NVME_SCT_GENERIC;
		rsp->status.sc = SPDK_NVME_SC_INVALID_NAMESPACE_OR_FORMAT;
		rsp->status.dnr = 1;
		return SPDK_NVMF_REQUEST_EXEC_STATUS_COMPLETE;
	}
	spdk_nvmf_ns_get_opts(ns, &opts, sizeof(opts));
	append_id(&list, SPDK_NVME_NIDT_EUI64, opts.eui64, sizeof(opts.eui64));
	append_id(&list, SPDK_NVME_NIDT_NGUID, opts.nguid, sizeof(opts.nguid));
	append_id(&list, SPDK_NVME_NIDT_UUID, &opts.uuid, sizeof(opts.uuid));
	/* The command set (CSI 0, NVM) is left out, as SPDK does: its absence says the same. */
	return SPDK_NVMF_REQUEST_EXEC_STATUS_COMPLETE;
}

static int
on_identify(struct spdk_nvmf_request *req)
{
	struct spdk_nvmf_ctrlr *ctrlr = spdk_nvmf_request_get_ctrlr(req);
	struct spdk_nvme_cmd *cmd = spdk_nvmf_request_get_cmd(req);
	struct spdk_nvme_cpl *rsp = spdk_nvmf_request_get_response(req);
	uint8_t data[SPDK_NVME_IDENTIFY_BUFLEN] = {};
	struct ps_association who;
	bool good;
	int rc;

	if (spdk_nvmf_subsystem_is_discovery(ctrlr->subsys) || req->iovcnt < 1 ||
	    req->length < SPDK_NVME_IDENTIFY_BUFLEN) {
		return -1; /* SPDK's own handling goes on */
	}
	switch (cmd->cdw10_bits.identify.cns) {
	case SPDK_NVME_IDENTIFY_NS:
		rc = spdk_nvmf_ctrlr_identify_ns(ctrlr, cmd, rsp, (void *)data);
		break;
	case SPDK_NVME_IDENTIFY_CTRLR:
		rc = spdk_nvmf_ctrlr_identify_ctrlr(ctrlr, (void *)data);
		break;
	case SPDK_NVME_IDENTIFY_NS_ID_DESCRIPTOR_LIST:
		rc = identify_id_list(ctrlr, cmd, rsp, data);
		break;
	case SPDK_NVME_IDENTIFY_NS_IOCS:
		rc = spdk_nvmf_ns_identify_iocs_specific(ctrlr, cmd, rsp, data, sizeof(data));
		break;
	case SPDK_NVME_IDENTIFY_NS_IOCS_INDEPENDENT:
		rc = spdk_nvmf_identify_ns_iocs_independent(ctrlr, cmd, rsp, (void *)data);
		break;
	default:
		/* The rest name no namespace, so a passthrough subsystem leaves them to SPDK too, unless a host
		 * sends one all the same: then it would reach the bdev as a raw admin command. */
		return -1;
	}
	good = rsp->status.sct == 0 && rsp->status.sc == 0;
	if (good && g_identify != NULL) {
		describe(req, &who);
		if (cmd->cdw10_bits.identify.cns == SPDK_NVME_IDENTIFY_CTRLR) {
			g_identify(PS_IDENTIFY_CONTROLLER, &who, 0, data);
		} else if (cmd->cdw10_bits.identify.cns == SPDK_NVME_IDENTIFY_NS) {
			g_identify(PS_IDENTIFY_NAMESPACE, &who, cmd->nsid, data);
		}
	}
	spdk_nvmf_request_copy_from_buf(req, data, sizeof(data));
	return rc;
}

/* ---- features of reservations ---- */

/* A passthrough subsystem would hand these to the bdev, and SPDK's own know SPDK's own reservations alone. Ours always persist through power loss,
 * and notifications of them are always masked: asking for that is fine, for anything else is not. */
static int
reservation_feature(struct spdk_nvmf_request *req, bool set)
{
	enum { ALL_MASKED = 0xe };
	struct spdk_nvmf_ctrlr *ctrlr = spdk_nvmf_request_get_ctrlr(req);
	struct spdk_nvme_cmd *cmd = spdk_nvmf_request_get_cmd(req);
	struct spdk_nvme_cpl *rsp = spdk_nvmf_request_get_response(req);
	uint8_t fid = cmd->cdw10 & 0xff;
	uint32_t is;

	switch (fid) {
	case SPDK_NVME_FEAT_HOST_RESERVE_MASK:
		is = ALL_MASKED;
		break;
	case SPDK_NVME_FEAT_HOST_RESERVE_PERSIST:
		is = 1;
		break;
	default:
		return -1; /* SPDK's own handling goes on */
	}
	if (spdk_nvmf_subsystem_is_discovery(ctrlr->subsys)) {
		return -1;
	}
	if (cmd->nsid != SPDK_NVME_GLOBAL_NS_TAG && nvmf_ctrlr_get_ns(ctrlr, cmd->nsid) == NULL) {
		rsp->status.sct = SPDK_NVME_SCT_GENERIC;
		rsp->status.sc = SPDK_NVME_SC_INVALID_NAMESPACE_OR_FORMAT;
		rsp->status.dnr = 1;
	} else if (!set) {
		rsp->cdw0 = is;
	} else if ((cmd->cdw11 & is) != is) {
		rsp->status.sct = SPDK_NVME_SCT_COMMAND_SPECIFIC;
		rsp->status.sc = SPDK_NVME_SC_FEATURE_NOT_CHANGEABLE;
		rsp->status.dnr = 1;
	}
	return SPDK_NVMF_REQUEST_EXEC_STATUS_COMPLETE;
}

static int
on_get_features(struct spdk_nvmf_request *req)
{
	return reservation_feature(req, false);
}

static int
on_set_features(struct spdk_nvmf_request *req)
{
	return reservation_feature(req, true);
}

void
ps_nvmf_set_identify_hook(ps_identify_fn fn)
{
	g_identify = fn;
	spdk_nvmf_set_custom_admin_cmd_hdlr(SPDK_NVME_OPC_GET_FEATURES, fn == NULL ? NULL : on_get_features);
	spdk_nvmf_set_custom_admin_cmd_hdlr(SPDK_NVME_OPC_SET_FEATURES, fn == NULL ? NULL : on_set_features);
	spdk_nvmf_set_custom_admin_cmd_hdlr(SPDK_NVME_OPC_IDENTIFY, fn == NULL ? NULL : on_identify);
}

/* ---- transports ---- */

struct transport_add {
	struct spdk_nvmf_tgt *tgt;
	struct spdk_nvmf_transport *transport;
	ps_status_fn done;
	void *arg;
	struct spdk_json_val json[8];
	char text[64];
};

static void
transport_added(void *arg, int status)
{
	struct transport_add *add = arg;

	if (status != 0 && add->transport != NULL) {
		spdk_nvmf_transport_destroy(add->transport, NULL, NULL);
	}
	add->done(add->arg, status);
	free(add);
}

static void
transport_created(void *arg, struct spdk_nvmf_transport *transport)
{
	struct transport_add *add = arg;

	if (transport == NULL) {
		transport_added(add, -EIO);
		return;
	}
	add->transport = transport;
	spdk_nvmf_tgt_add_transport(add->tgt, transport, transport_added, add);
}

int
ps_nvmf_transport_add(struct spdk_nvmf_tgt *tgt, const char *name, const struct ps_transport_opts *o,
		      ps_status_fn done, void *arg)
{
	struct spdk_nvmf_transport_opts opts = {};
	struct transport_add *add;
	void *end;
	int rc;

	if (spdk_nvmf_tgt_get_transport(tgt, name) != NULL) {
		return -EEXIST;
	}
	if (!spdk_nvmf_transport_opts_init(name, &opts, sizeof(opts))) {
		return -EPROTONOSUPPORT;
	}
#define SET(field, value) if ((value) != 0) { opts.field = (value); }
	SET(io_unit_size, o->io_unit_size)
	SET(max_io_size, o->max_io_size)
	SET(in_capsule_data_size, o->in_capsule_data_size)
	SET(max_queue_depth, o->max_queue_depth)
	SET(max_qpairs_per_ctrlr, o->max_qpairs_per_ctrlr)
	SET(num_shared_buffers, o->num_shared_buffers)
	SET(buf_cache_size, o->buf_cache_size)
	SET(abort_timeout_sec, o->abort_timeout_s)
	SET(acceptor_poll_rate, o->acceptor_poll_us)
#undef SET
	if (o->mask_copy) {
		/* COMPARE stays: compare-and-write is two commands fused, and hosts want both bits. */
		opts.oncs.nvmcpys = 0;
	}
	add = calloc(1, sizeof(*add));
	if (add == NULL) {
		return -ENOMEM;
	}
	add->tgt = tgt;
	add->done = done;
	add->arg = arg;
	if (o->disable_mappable_bar0) {
		snprintf(add->text, sizeof(add->text), "{\"disable_mappable_bar0\":true}");
		if (spdk_json_parse(add->text, strlen(add->text), add->json, SPDK_COUNTOF(add->json), &end, 0) < 0) {
			free(add);
			return -EINVAL;
		}
		opts.transport_specific = add->json;
	}
	rc = spdk_nvmf_transport_create_async(name, &opts, transport_created, add);
	if (rc != 0) {
		free(add);
	}
	return rc;
}

/* ---- subsystems ---- */

struct spdk_nvmf_subsystem *
ps_nvmf_subsystem_create(struct spdk_nvmf_tgt *tgt, const char *nqn, uint32_t max_namespaces, bool passthrough)
{
	struct spdk_nvmf_subsystem *subsystem;

	subsystem = spdk_nvmf_subsystem_create(tgt, nqn, SPDK_NVMF_SUBTYPE_NVME, max_namespaces);
	if (subsystem != NULL) {
		/* Only the JSON-RPC sets this; there is no call for it. */
		subsystem->passthrough = passthrough;
	}
	return subsystem;
}

int
ps_nvmf_tgt_listen(struct spdk_nvmf_tgt *tgt, const struct ps_listen *listen)
{
	struct spdk_nvmf_listen_opts opts;
	struct spdk_nvme_transport_id trid;
	int rc = make_trid(listen, &trid);

	if (rc != 0) {
		return rc;
	}
	spdk_nvmf_listen_opts_init(&opts, sizeof(opts));
	return spdk_nvmf_tgt_listen_ext(tgt, &trid, &opts);
}

int
ps_nvmf_tgt_stop_listen(struct spdk_nvmf_tgt *tgt, const struct ps_listen *listen)
{
	struct spdk_nvme_transport_id trid;
	int rc = make_trid(listen, &trid);

	return rc != 0 ? rc : spdk_nvmf_tgt_stop_listen(tgt, &trid);
}

int
ps_nvmf_add_listener(struct spdk_nvmf_subsystem *subsystem, const struct ps_listen *listen,
		     ps_status_fn done, void *arg)
{
	struct spdk_nvmf_listener_opts opts;
	struct spdk_nvme_transport_id trid;
	int rc = make_trid(listen, &trid);

	if (rc != 0) {
		return rc;
	}
	spdk_nvmf_subsystem_listener_opts_init(&opts, sizeof(opts));
	opts.ana_state = (enum spdk_nvme_ana_state)listen->ana_state;
	spdk_nvmf_subsystem_add_listener_ext(subsystem, &trid, done, arg, &opts);
	return 0;
}

int
ps_nvmf_remove_listener(struct spdk_nvmf_tgt *tgt, struct spdk_nvmf_subsystem *subsystem,
			const struct ps_listen *listen, ps_status_fn done, void *arg)
{
	struct spdk_nvmf_transport *transport;
	struct spdk_nvme_transport_id trid;
	int rc = make_trid(listen, &trid);

	if (rc != 0) {
		return rc;
	}
	transport = spdk_nvmf_tgt_get_transport(tgt, listen->transport);
	if (transport == NULL) {
		return -EPROTONOSUPPORT;
	}
	rc = spdk_nvmf_subsystem_remove_listener(subsystem, &trid);
	if (rc != 0) {
		return rc;
	}
	/* Disconnects this subsystem's qpairs on the address. */
	return spdk_nvmf_transport_stop_listen_async(transport, &trid, subsystem, done, arg);
}

int
ps_nvmf_set_ana_state(struct spdk_nvmf_subsystem *subsystem, const struct ps_listen *listen,
		      uint32_t anagrpid, ps_status_fn done, void *arg)
{
	struct spdk_nvme_transport_id trid;
	int rc = make_trid(listen, &trid);

	if (rc != 0) {
		return rc;
	}
	spdk_nvmf_subsystem_set_ana_state(subsystem, &trid, (enum spdk_nvme_ana_state)listen->ana_state, anagrpid,
					  done, arg);
	return 0;
}

uint32_t
ps_nvmf_add_ns(struct spdk_nvmf_subsystem *subsystem, const char *bdev, uint32_t nsid,
	       const uint8_t nguid[16], const uint8_t uuid[16], uint32_t anagrpid)
{
	struct spdk_nvmf_ns_opts opts;

	spdk_nvmf_ns_opts_get_defaults(&opts, sizeof(opts));
	opts.nsid = nsid;
	memcpy(opts.nguid, nguid, 16);
	memcpy(&opts.uuid, uuid, 16);
	opts.anagrpid = anagrpid;
	return spdk_nvmf_subsystem_add_ns_ext(subsystem, bdev, &opts, sizeof(opts), NULL);
}

void
ps_nvmf_hosts(struct spdk_nvmf_subsystem *subsystem, void (*sink)(void *arg, const char *host_nqn), void *arg)
{
	struct spdk_nvmf_ctrlr *ctrlr;

	TAILQ_FOREACH(ctrlr, &subsystem->ctrlrs, link) {
		sink(arg, ctrlr->hostnqn);
	}
}

/* ---- ending associations ---- */

struct disconnect_all {
	struct spdk_nvmf_subsystem *subsystem;
	ps_status_fn done;
	void *arg;
	int failed; /* the groups are visited one after the other */
};

static void
disconnect_in_group(struct spdk_io_channel_iter *i)
{
	struct disconnect_all *all = spdk_io_channel_iter_get_ctx(i);
	struct spdk_nvmf_poll_group *group = spdk_io_channel_get_ctx(spdk_io_channel_iter_get_channel(i));
	struct spdk_nvmf_qpair *qpair, *next;
	int rc;

	TAILQ_FOREACH_SAFE(qpair, &group->qpairs, link, next) {
		if (qpair->ctrlr != NULL && qpair->ctrlr->subsys == all->subsystem) {
			rc = spdk_nvmf_qpair_disconnect(qpair);
			if (rc != 0 && rc != -EINPROGRESS) {
				all->failed = rc;
			}
		}
	}
	spdk_for_each_channel_continue(i, 0);
}

static void
disconnect_done(struct spdk_io_channel_iter *i, int status)
{
	struct disconnect_all *all = spdk_io_channel_iter_get_ctx(i);

	all->done(all->arg, all->failed != 0 ? all->failed : status);
	free(all);
}

int
ps_nvmf_disconnect_all(struct spdk_nvmf_subsystem *subsystem, ps_status_fn done, void *arg)
{
	struct disconnect_all *all = calloc(1, sizeof(*all));

	if (all == NULL) {
		return -ENOMEM;
	}
	all->subsystem = subsystem;
	all->done = done;
	all->arg = arg;
	spdk_for_each_channel(subsystem->tgt, disconnect_in_group, all, disconnect_done);
	return 0;
}
