//! What a server answers when it cannot do what was asked, in the form that OpenAI's clients read.

use std::path::PathBuf;

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// See the module. The variants up to `Internal` are answers to requests; the others end [`crate::serve`].
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The request is not one.
    #[error("{message}")]
    Invalid {
        /// What is wrong with it.
        message: String,
        /// The parameter, where it is one.
        param: Option<&'static str>,
    },
    /// A parameter that this server does not have.
    #[error("{param} is not supported")]
    Unsupported {
        /// Its name.
        param: &'static str,
    },
    /// Prompt and answer do not fit a session.
    #[error(
        "the session would have {tokens} tokens, {limit_tokens} is the most; shorten the prompt or max_tokens"
    )]
    TooLong {
        /// Tokens there would be.
        tokens: u64,
        /// The most there may be.
        limit_tokens: u64,
    },
    /// No key, or an unknown one.
    #[error("a valid API key is needed: Authorization: Bearer KEY")]
    Key,
    /// A page of another site asks, or one that pretends to be this one.
    #[error("requests from another site are refused")]
    ForeignSite,
    /// Nothing is at this path.
    #[error("there is nothing at this path")]
    NoRoute,
    /// The path has no such method.
    #[error("this path does not have this method")]
    NoMethod,
    /// Another model is served.
    #[error("the model {model:?} is not served here")]
    NoModel {
        /// What was asked for.
        model: String,
    },
    /// The caller has no such session.
    #[error("there is no session {id:?}")]
    NoSession {
        /// What was asked for.
        id: String,
    },
    /// A body did not come in time.
    #[error("the body did not arrive within {limit_s} s")]
    SlowBody {
        /// Seconds there are for it.
        limit_s: f64,
    },
    /// The session is not in a state that allows the call; it is as it was.
    #[error("{message}")]
    Conflict {
        /// Why.
        message: String,
    },
    /// The session was open when the server last died, and had not been saved.
    #[error("session {id:?} was lost when the server ended without saving it")]
    Lost {
        /// The session.
        id: String,
    },
    /// A body is too long.
    #[error("the body is longer than {limit_bytes} bytes")]
    BodyTooLarge {
        /// The most there may be.
        limit_bytes: usize,
    },
    /// A body of another type.
    #[error("the body has to be {expected}")]
    MediaType {
        /// What it has to be.
        expected: &'static str,
    },
    /// As many as there may be.
    #[error("there are {limit} {what} already, which is the most; try again in {retry_s} s")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The most there may be.
        limit: usize,
        /// Seconds after which to try again.
        retry_s: u64,
    },
    /// Memory or disk are full.
    #[error("{message}")]
    NoRoom {
        /// Which, with the bytes.
        message: String,
    },
    /// The first turn did not come in time.
    #[error("no turn within {limit_s} s")]
    QueueTimeout {
        /// Seconds there are for it.
        limit_s: f64,
    },
    /// The server is ending.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The executor failed in a way it does not explain.
    #[error("{message}")]
    Internal {
        /// What is known.
        message: String,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {reason}")]
    Bind {
        /// The address.
        address: String,
        /// The operating system's words.
        reason: String,
    },
    /// An address that others reach, without keys.
    #[error("{address} can be reached by others, so it needs API keys")]
    Unprotected {
        /// The address.
        address: String,
    },
    /// The folder of saved sessions cannot be used.
    #[error("{}: {reason}", path.display())]
    State {
        /// File or folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    /// A request that is wrong about `param`.
    pub fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), param: Some(param) }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::Invalid { .. } | Self::Unsupported { .. } | Self::TooLong { .. } => StatusCode::BAD_REQUEST,
            Self::Key => StatusCode::UNAUTHORIZED,
            Self::ForeignSite => StatusCode::FORBIDDEN,
            Self::NoRoute | Self::NoModel { .. } | Self::NoSession { .. } => StatusCode::NOT_FOUND,
            Self::NoMethod => StatusCode::METHOD_NOT_ALLOWED,
            Self::SlowBody { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::Conflict { .. } => StatusCode::CONFLICT,
            Self::Lost { .. } => StatusCode::GONE,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::MediaType { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::TooMany { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::NoRoom { .. } | Self::QueueTimeout { .. } | Self::ShuttingDown => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Internal { .. } | Self::Bind { .. } | Self::Unprotected { .. } | Self::State { .. } => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        }
    }

    fn code(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "invalid_value",
            Self::Unsupported { .. } => "unsupported_parameter",
            Self::TooLong { .. } => "context_length_exceeded",
            Self::Key => "invalid_api_key",
            Self::ForeignSite => "foreign_site",
            Self::NoRoute => "unknown_url",
            Self::NoMethod => "method_not_allowed",
            Self::NoModel { .. } => "model_not_found",
            Self::NoSession { .. } => "session_not_found",
            Self::SlowBody { .. } => "slow_body",
            Self::Conflict { .. } => "session_conflict",
            Self::Lost { .. } => "session_lost",
            Self::BodyTooLarge { .. } => "body_too_large",
            Self::MediaType { .. } => "media_type",
            Self::TooMany { .. } => "rate_limit_exceeded",
            Self::NoRoom { .. } => "no_room",
            Self::QueueTimeout { .. } => "queue_timeout",
            Self::ShuttingDown => "shutting_down",
            Self::Internal { .. } => "internal_error",
            Self::Bind { .. } | Self::Unprotected { .. } | Self::State { .. } => "start",
        }
    }

    /// As OpenAI's clients read it.
    pub fn to_json(&self) -> serde_json::Value {
        let status = self.status();
        let kind = match status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let param = match self {
            Self::Invalid { param, .. } => *param,
            Self::Unsupported { param } => Some(*param),
            _ => None,
        };
        json!({"error": {"message": self.to_string(), "type": kind, "param": param, "code": self.code()}})
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.to_json().to_string()));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let retry_s = match &self {
            Self::TooMany { retry_s, .. } => Some(*retry_s),
            error if error.status() == StatusCode::SERVICE_UNAVAILABLE => Some(1),
            _ => None,
        };
        if let Some(seconds) = retry_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if matches!(self, Self::Key) {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
