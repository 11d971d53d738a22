//! JSON-RPC methods in Rust on SPDK's socket: typed parameters and results, answers now or later, real error codes.
//!
//! SPDK polls the socket every 4 ms, takes requests of at most 32 KiB, and checks no identity. Not here: a client.

use crate::app;
use crate::callback::c_string;
use crate::status::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::rc::Rc;

/// A JSON-RPC error: code, message, and more for programs, such as what to do next.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message} (JSON-RPC error {code})")]
pub struct RpcError {
    pub code: i32,
    pub message: String,
    pub data: Option<serde_json::Value>,
}

impl RpcError {
    pub const INVALID_PARAMS: i32 = -32602;
    pub const INTERNAL: i32 = -32603;

    pub fn new(code: i32, message: impl Into<String>) -> RpcError {
        RpcError { code, message: message.into(), data: None }
    }

    pub fn with_data(self, data: serde_json::Value) -> RpcError {
        RpcError { data: Some(data), ..self }
    }

    pub fn invalid_params(message: impl Into<String>) -> RpcError {
        RpcError::new(RpcError::INVALID_PARAMS, message)
    }

    pub fn internal(message: impl Into<String>) -> RpcError {
        RpcError::new(RpcError::INTERNAL, message)
    }
}

/// As SPDK's own methods do: the negated errno is the code.
impl From<Errno> for RpcError {
    fn from(errno: Errno) -> RpcError {
        RpcError::new(-errno.raw(), errno.to_string())
    }
}

/// The way to answer one request, once, on the app thread. Dropped, it answers with an internal error.
pub struct Reply<R> {
    request: Option<NonNull<spdk_sys::spdk_jsonrpc_request>>,
    method: &'static str,
    _result: PhantomData<fn(R)>,
}

impl<R: Serialize> Reply<R> {
    /// Answers. Harmless if the client has gone meanwhile.
    pub fn send(mut self, answer: Result<R, RpcError>) {
        let Some(request) = self.request.take() else { return };
        let answer = answer.and_then(|result| {
            serde_json::to_vec(&result).map_err(|e| RpcError::internal(format!("the result cannot be written as JSON: {e}")))
        });
        match answer {
            // SAFETY: answered once, since it was taken; SPDK keeps the request until then. The text is copied.
            Ok(json) => unsafe { spdk_sys::ps_rpc_result(request.as_ptr(), json.as_ptr().cast(), json.len()) },
            Err(error) => send_error(request, &error),
        }
    }

    pub fn ok(self, result: R) {
        self.send(Ok(result));
    }

    pub fn err(self, error: RpcError) {
        self.send(Err(error));
    }
}

fn send_error(request: NonNull<spdk_sys::spdk_jsonrpc_request>, error: &RpcError) {
    let message = c_string(&error.message.replace('\0', " ")).unwrap_or_default();
    let data = error.data.as_ref().map(serde_json::Value::to_string);
    let (pointer, len) = data.as_ref().map_or((std::ptr::null(), 0), |text| (text.as_ptr(), text.len()));
    // SAFETY: as above; the texts are copied.
    unsafe { spdk_sys::ps_rpc_error(request.as_ptr(), error.code, message.as_ptr(), pointer.cast(), len) };
}

impl<R> Drop for Reply<R> {
    fn drop(&mut self) {
        if let Some(request) = self.request.take()
            && app::env_is_up()
        {
            send_error(request, &RpcError::internal(format!("{} gave no answer", self.method)));
        }
    }
}

type Handler = Rc<dyn Fn(NonNull<spdk_sys::spdk_jsonrpc_request>, &[u8])>;
thread_local! {
    /// By the number that the shim gave. Filled by the thread that runs the app, which is the one that is called back.
    static HANDLERS: RefCell<Vec<Handler>> = const { RefCell::new(Vec::new()) };
}

/// Adds a method. On the thread that will call [`crate::app::App::run`], before or within it (before: no client can come too
/// early). A method without parameters takes `()` or a struct of options; `params` may then be absent. 64 methods at most.
pub fn register<P, R>(method: &'static str, handler: impl Fn(P, Reply<R>) + 'static) -> Result<(), Errno>
where
    P: DeserializeOwned,
    R: Serialize + 'static,
{
    let name = c_string(method)?;
    let handler: Handler = Rc::new(move |request, text| {
        let reply = Reply::<R> { request: Some(request), method, _result: PhantomData };
        match parse::<P>(text) {
            Ok(params) => handler(params, reply),
            Err(e) => reply.err(RpcError::invalid_params(format!("{method}: {e}"))),
        }
    });
    // The name stays with SPDK for ever.
    let name = Box::leak(name.into_boxed_c_str());
    HANDLERS.with_borrow_mut(|handlers| {
        // SAFETY: SPDK's list of methods is only touched by this thread.
        let slot = unsafe { spdk_sys::ps_rpc_register(name.as_ptr(), Some(dispatch)) };
        let slot = usize::try_from(slot).map_err(|_| Errno::new(slot.abs()))?;
        assert_eq!(slot, handlers.len(), "all methods are registered on one thread");
        handlers.push(handler);
        Ok(())
    })
}

/// Absent parameters are no object: either the type takes null, or an empty object.
fn parse<P: DeserializeOwned>(text: &[u8]) -> Result<P, serde_json::Error> {
    if text.is_empty() { serde_json::from_str("null").or_else(|_| serde_json::from_str("{}")) } else { serde_json::from_slice(text) }
}

extern "C" fn append(sink: *mut c_void, data: *const c_void, size: usize) -> c_int {
    // SAFETY: `dispatch` passes its vector, and the shim the bytes that it wrote.
    unsafe { (*sink.cast::<Vec<u8>>()).extend_from_slice(std::slice::from_raw_parts(data.cast::<u8>(), size)) };
    0
}

extern "C" fn dispatch(slot: c_int, request: *mut spdk_sys::spdk_jsonrpc_request, params: *const spdk_sys::spdk_json_val) {
    let Some(request) = NonNull::new(request) else { return };
    let mut text = Vec::new();
    if !params.is_null() {
        // SAFETY: a parsed value that lives for this call; the sink is our vector.
        let rc = unsafe { spdk_sys::ps_json_text(params, Some(append), (&raw mut text).cast()) };
        if rc != 0 {
            return send_error(request, &RpcError::internal("the parameters could not be read"));
        }
    }
    let handler = HANDLERS.with_borrow(|handlers| usize::try_from(slot).ok().and_then(|slot| handlers.get(slot).cloned()));
    match handler {
        Some(handler) => handler(request, &text),
        None => send_error(request, &RpcError::internal("the method is not served by this thread")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Options {
        #[serde(default)]
        deep: bool,
    }

    #[test]
    fn absent_parameters_suit_unit_option_and_struct_of_defaults() {
        assert!(parse::<()>(b"").is_ok());
        assert_eq!(parse::<Option<u32>>(b"").ok(), Some(None));
        assert!(parse::<Options>(b"").is_ok_and(|options| !options.deep));
        assert!(parse::<u32>(b"").is_err());
        assert!(parse::<Options>(b"{\"deep\":true}").is_ok_and(|options| options.deep));
    }
}
