//! JSON-RPC 2.0 envelopes. SPDK frames messages by JSON syntax alone: no length, no newline.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ErrorCode, Method, REQUEST_BYTES_MAX, RpcError};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    pub jsonrpc: String,
    pub id: u64,
    pub method: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub params: Option<Value>,
}

/// Exactly one of `result` and `error` is there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Response {
    pub jsonrpc: String,
    /// Null if the request was too broken to have one.
    pub id: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<RpcError>,
}

/// Encodes a call; refuses one that SPDK would not take.
pub fn encode_request<M: Method>(id: u64, params: &M::Params) -> Result<Vec<u8>, RpcError> {
    let invalid = |message: String| RpcError::new(ErrorCode::Invalid, message);
    let params = serde_json::to_value(params).map_err(|e| invalid(format!("{} cannot be encoded: {e}", M::NAME)))?;
    // SPDK's parser refuses an empty object where it expects no params.
    let params = Some(params).filter(|p| p.as_object().is_none_or(|o| !o.is_empty()));
    let request = Request { jsonrpc: "2.0".to_owned(), id, method: M::NAME.to_owned(), params };
    let bytes = serde_json::to_vec(&request).map_err(|e| invalid(format!("{} cannot be encoded: {e}", M::NAME)))?;
    if bytes.len() > REQUEST_BYTES_MAX {
        let message = format!("{} has {} bytes, a request may have {REQUEST_BYTES_MAX}", M::NAME, bytes.len());
        return Err(invalid(message));
    }
    Ok(bytes)
}

/// Reads the params of a call at the node. An absent `params` reads as `{}`.
pub fn decode_params<M: Method>(params: Option<Value>) -> Result<M::Params, RpcError> {
    let params = params.filter(|p| !p.is_null()).unwrap_or_else(|| Value::Object(serde_json::Map::new()));
    serde_path_to_error::deserialize(params).map_err(|e| {
        let field = e.path().to_string();
        let at = if field == "." { String::new() } else { format!("{field}: ") };
        RpcError::new(ErrorCode::Invalid, format!("params of {}: {at}{}", M::NAME, e.into_inner()))
    })
}

/// Reads a result at control. A missing result and one of another shape are errors, never defaults.
pub fn decode_response<M: Method>(response: Response) -> Result<M::Result, RpcError> {
    if let Some(error) = response.error {
        return Err(error);
    }
    let wrong = |what: String| {
        RpcError::new(ErrorCode::Internal, format!("the answer to {} {what}", M::NAME))
            .with_hint("check that penstockd and penstock-control are of the same version")
    };
    let result = response.result.ok_or_else(|| wrong("has neither result nor error".to_owned()))?;
    serde_json::from_value(result).map_err(|e| wrong(format!("has an unexpected shape: {e}")))
}
