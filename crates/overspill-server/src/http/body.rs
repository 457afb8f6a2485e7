//! Bodies, whole, within their limits.

use std::{sync::Arc, time::Duration};

use axum::{
    body::{self, Body, Bytes},
    extract::{FromRequest, Request},
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
};
use serde_json::Value;

use super::App;
use crate::{Error, Result, request::Fields};

/// All of a body, if it is not longer than `limit_bytes` and comes in time.
pub async fn read(app: &App, body: Body, limit_bytes: usize) -> Result<Bytes> {
    let limit_s = app.limits.body_s;
    let read = body::to_bytes(body, limit_bytes);
    match tokio::time::timeout(Duration::from_secs_f64(limit_s), read).await {
        Err(_) => Err(Error::SlowBody { limit_s }),
        // What breaks off, or is not encoded as it says, ends the connection: nobody reads the answer.
        Ok(Err(_)) => Err(Error::BodyTooLarge { limit_bytes }),
        Ok(Ok(bytes)) => Ok(bytes),
    }
}

/// A body of JSON. Its type has to say so: a form of another site's page cannot.
pub struct Json(pub Bytes);

impl FromRequest<Arc<App>> for Json {
    type Rejection = Error;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self> {
        let (parts, body) = request.into_parts();
        let bytes = read(app, body, app.limits.body_bytes).await?;
        if !bytes.is_empty() {
            expect_type(&parts.headers, "application/json")?;
        }
        Ok(Self(bytes))
    }
}

/// As [`Json`], by member.
pub struct Members(pub Fields);

impl FromRequest<Arc<App>> for Members {
    type Rejection = Error;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self> {
        let Json(bytes) = Json::from_request(request, app).await?;
        Fields::parse(&bytes).map(Self)
    }
}

/// Refuses a body of another type.
pub fn expect_type(headers: &HeaderMap, expected: &'static str) -> Result<()> {
    let value = headers.get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    let found = value.split(|&byte| byte == b';').next().unwrap_or(value).trim_ascii();
    if found.eq_ignore_ascii_case(expected.as_bytes()) { Ok(()) } else { Err(Error::MediaType { expected }) }
}

/// An answer of this type.
pub fn typed(mime: &'static str, body: impl Into<Body>) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static(mime))], body.into()).into_response()
}

/// A JSON answer.
pub fn json(value: &Value) -> Response {
    typed("application/json", value.to_string())
}
