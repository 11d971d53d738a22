//! Calls to penstock-control's HTTP API.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use penstock_api::http::ApiError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use ureq::Agent;
use ureq::http::Request;
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::TcpConnector;

use crate::failure::Failure;
use crate::transport::{NoResolver, SocketConnector};

/// Above control's own limits: opening drives and draining take their time.
const CALL_LIMIT: Duration = Duration::from_secs(150);
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Far above any list of ours.
const ANSWER_BYTES_MAX: u64 = 256 << 20;

/// Where control is: `unix:PATH` or `http://127.0.0.1:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Api {
    Unix(PathBuf),
    Http(String),
}

impl FromStr for Api {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match (text.strip_prefix("unix:"), text.strip_prefix("http://")) {
            (Some(path), _) if !path.is_empty() => Ok(Self::Unix(path.into())),
            (_, Some(host)) if !host.trim_end_matches('/').is_empty() => Ok(Self::Http(text.trim_end_matches('/').to_owned())),
            _ => Err(format!("\"{text}\" is neither unix:PATH nor http://127.0.0.1:PORT")),
        }
    }
}

impl fmt::Display for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Http(base) => f.write_str(base),
        }
    }
}

pub struct Client {
    agent: Agent,
    api: Api,
}

/// What people name something by, if it may stand in a path.
pub fn checked<'a, Name: FromStr, Id: FromStr>(text: &'a str, of: &str, hint: &str) -> Result<&'a str, Failure> {
    if text.parse::<Name>().is_ok() || text.parse::<Id>().is_ok() {
        return Ok(text);
    }
    let shown: String = text.chars().take(64).collect();
    Err(Failure::Usage { message: format!("\"{shown}\" is neither a {of}'s name nor its id"), hint: hint.to_owned() })
}

/// An answer that is not an error.
pub struct Answer {
    body: Vec<u8>,
}

impl Answer {
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_slice(&self.body).map_err(|error| Failure::Garbled(error.to_string()))
    }
}

impl Client {
    pub fn new(api: &Api) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(CALL_LIMIT))
            .timeout_connect(Some(CONNECT_LIMIT))
            .proxy(None)
            .user_agent(concat!("penstock/", env!("CARGO_PKG_VERSION")))
            .build();
        let agent = match api {
            Api::Unix(path) => Agent::with_parts(config, SocketConnector(path.clone()), NoResolver),
            Api::Http(_) => Agent::with_parts(config, TcpConnector::default(), DefaultResolver::default()),
        };
        Self { agent, api: api.clone() }
    }

    fn call(&self, method: &str, path: &str, body: Vec<u8>) -> Result<Answer, Failure> {
        let base = match &self.api {
            Api::Unix(_) => "http://localhost",
            Api::Http(base) => base,
        };
        let unreachable = |reason: String| Failure::Unreachable { api: self.api.to_string(), reason };
        let request = Request::builder().method(method).uri(format!("{base}{path}")).header("content-type", "application/json");
        let bad_uri = |error: ureq::http::Error| Failure::Usage {
            message: format!("{base}{path} cannot be asked for: {error}"),
            hint: "check --api and the name".to_owned(),
        };
        // A request without a body must not announce one: some methods would be refused with it.
        let response = if body.is_empty() {
            self.agent.run(request.body(()).map_err(bad_uri)?)
        } else {
            self.agent.run(request.body(body).map_err(bad_uri)?)
        };
        let mut response = response.map_err(|error| unreachable(error.to_string()))?;
        let status = response.status().as_u16();
        let body = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec();
        let body = body.map_err(|error| unreachable(error.to_string()))?;
        if (200..300).contains(&status) {
            return Ok(Answer { body });
        }
        match serde_json::from_slice::<ApiError>(&body) {
            Ok(error) => Err(Failure::Refused(error)),
            Err(_) => Err(Failure::Garbled(format!("status {status}"))),
        }
    }

    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.call("GET", path, vec![])?.json()
    }

    pub fn delete(&self, path: &str, force: bool) -> Result<Answer, Failure> {
        self.call("DELETE", &format!("{path}{}", if force { "?force=true" } else { "" }), vec![])
    }

    pub fn send(&self, method: &str, path: &str, body: &impl Serialize) -> Result<Answer, Failure> {
        let body = serde_json::to_vec(body).map_err(|error| Failure::Garbled(error.to_string()))?;
        self.call(method, path, body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn api_forms_parse() {
        assert_eq!("unix:/x".parse(), Ok(Api::Unix("/x".into())));
        assert_eq!("http://127.0.0.1:7600/".parse(), Ok(Api::Http("http://127.0.0.1:7600".to_owned())));
        for bad in ["", "unix:", "http://", "https://x", "/run/x"] {
            assert!(bad.parse::<Api>().unwrap_err().contains("neither"), "{bad}");
        }
    }
}
