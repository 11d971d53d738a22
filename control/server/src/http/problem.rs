//! Errors as answers, and extractors whose rejections are such errors.

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use penstock_api::http::{ApiError, BODY_BYTES_MAX};
use penstock_api::rpc::{ErrorCode, RpcError};

use crate::node::CallError;

/// An [`ApiError`] on its way out.
#[derive(Debug)]
pub struct Problem(pub ApiError);

pub fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::Invalid => StatusCode::BAD_REQUEST,
        ErrorCode::NotReady => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::Capacity => StatusCode::INSUFFICIENT_STORAGE,
        ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        ErrorCode::AlreadyExists | ErrorCode::Busy | ErrorCode::ForeignData | ErrorCode::Fenced | ErrorCode::Conflict => {
            StatusCode::CONFLICT
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        (status(self.0.code), Json(self.0)).into_response()
    }
}

impl From<ApiError> for Problem {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl From<RpcError> for Problem {
    fn from(error: RpcError) -> Self {
        let code = error.kind().unwrap_or(ErrorCode::Internal);
        let hint = error.hint().map(str::to_owned);
        Self(ApiError { code, message: error.message, hint })
    }
}

impl From<CallError> for Problem {
    fn from(error: CallError) -> Self {
        let away = matches!(error, CallError::Away(_));
        let mut problem = Self::from(error.into_rpc());
        if away {
            problem.0.hint = Some("start penstockd, or point penstock-control at its socket with --node-socket or --node".to_owned());
        }
        problem
    }
}

fn invalid(message: String) -> Problem {
    Problem(ApiError::new(ErrorCode::Invalid, message))
}

/// A JSON body.
#[derive(FromRequest)]
#[from_request(via(axum::Json), rejection(Problem))]
pub struct Body<T>(pub T);

impl From<JsonRejection> for Problem {
    fn from(rejection: JsonRejection) -> Self {
        if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
            return invalid(format!("the body has more than {BODY_BYTES_MAX} bytes, the most that a request may have"));
        }
        invalid(format!("the body: {}", rejection.body_text()))
    }
}

/// A query string.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(Problem))]
pub struct Query<T>(pub T);

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        invalid(format!("the query: {}", rejection.body_text()))
    }
}

/// A part of the path.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(Problem))]
pub struct Part<T>(pub T);

impl From<PathRejection> for Problem {
    fn from(rejection: PathRejection) -> Self {
        invalid(format!("the path: {}", rejection.body_text()))
    }
}
