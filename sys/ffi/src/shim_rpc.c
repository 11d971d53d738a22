/* JSON-RPC methods. SPDK's handlers carry no context, so each method gets a function of its own. See shim.h. */
#include "shim.h"
#include "jsonrpc_internal.h"

static ps_rpc_fn g_dispatch;
static int g_methods;

#define METHOD(n) \
	static void method_##n(struct spdk_jsonrpc_request *request, const struct spdk_json_val *params) \
	{ \
		g_dispatch(n, request, params); \
	}
#define EIGHT(F, t) F(t##0) F(t##1) F(t##2) F(t##3) F(t##4) F(t##5) F(t##6) F(t##7)
/* Octal digits, so that the names spell the numbers. */
#define ALL(F) EIGHT(F, 00) EIGHT(F, 01) EIGHT(F, 02) EIGHT(F, 03) EIGHT(F, 04) EIGHT(F, 05) EIGHT(F, 06) EIGHT(F, 07)
ALL(METHOD)

#define ENTRY(n) method_##n,
static const spdk_rpc_method_handler g_handlers[PS_RPC_METHODS_MAX] = { ALL(ENTRY) };

int
ps_rpc_register(const char *name, ps_rpc_fn dispatch)
{
	if (g_methods == PS_RPC_METHODS_MAX) {
		return -ENOSPC;
	}
	g_dispatch = dispatch;
	spdk_rpc_register_method(name, g_handlers[g_methods], SPDK_RPC_STARTUP | SPDK_RPC_RUNTIME);
	return g_methods++;
}

int
ps_json_text(const struct spdk_json_val *val, ps_json_sink write, void *sink)
{
	struct spdk_json_write_ctx *w = spdk_json_write_begin(write, sink, 0);
	int rc;

	if (w == NULL) {
		return -ENOMEM;
	}
	rc = spdk_json_write_val(w, val);
	if (spdk_json_write_end(w) != 0 && rc == 0) {
		rc = -EIO;
	}
	return rc;
}

void
ps_rpc_result(struct spdk_jsonrpc_request *request, const void *json, size_t len)
{
	struct spdk_json_write_ctx *w = spdk_jsonrpc_begin_result(request);

	spdk_json_write_val_raw(w, json, len);
	spdk_jsonrpc_end_result(request, w);
}

void
ps_rpc_error(struct spdk_jsonrpc_request *request, int code, const char *msg, const void *data, size_t len)
{
	struct spdk_json_write_ctx *w = request->response;

	if (data == NULL) {
		spdk_jsonrpc_send_error_response(request, code, msg);
		return;
	}
	/* SPDK's own call has no place for the member `data` that JSON-RPC 2.0 provides for. */
	spdk_json_write_object_begin(w);
	spdk_json_write_named_string(w, "jsonrpc", "2.0");
	spdk_json_write_name(w, "id");
	if (request->id != NULL) {
		spdk_json_write_val(w, request->id);
	} else {
		spdk_json_write_null(w);
	}
	spdk_json_write_named_object_begin(w, "error");
	spdk_json_write_named_int32(w, "code", code);
	spdk_json_write_named_string(w, "message", msg);
	spdk_json_write_name(w, "data");
	spdk_json_write_val_raw(w, data, len);
	spdk_json_write_object_end(w);
	spdk_json_write_object_end(w);
	spdk_json_write_end(w);
	request->response = NULL;
	jsonrpc_server_send_response(request);
}
