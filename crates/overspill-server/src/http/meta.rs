//! The page, and the routes that tell about the server.

use std::sync::{Arc, atomic::Ordering};

use axum::{
    extract::State,
    http::{HeaderValue, header},
    response::Response,
};
use serde_json::json;

use super::{App, Caller, body, watch};
use crate::{Error, Result};

/// Nothing but what comes from here, and no frame of another site around it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

/// `GET /`
pub async fn page() -> Response {
    let mut response = body::typed("text/html; charset=utf-8", include_str!("../../page/page.html"));
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    response
}

/// `GET /page.css`
pub async fn css() -> Response {
    body::typed("text/css; charset=utf-8", include_str!("../../page/page.css"))
}

/// `GET /page.js`
pub async fn js() -> Response {
    body::typed("text/javascript; charset=utf-8", include_str!("../../page/page.js"))
}

/// `GET /healthz`
pub async fn health(State(app): State<Arc<App>>) -> Result<Response> {
    if app.is_ending.load(Ordering::Relaxed) {
        return Err(Error::ShuttingDown);
    }
    Ok(body::json(&json!({"status": "ok"})))
}

/// `GET /metrics`
pub async fn metrics(State(app): State<Arc<App>>, Caller(_): Caller) -> Response {
    let live = watch::recent(&app).await;
    let text = app.metrics.to_text(live.as_deref());
    body::typed("text/plain; version=0.0.4; charset=utf-8", text)
}

/// `GET /openapi.json`
pub async fn openapi(State(app): State<Arc<App>>) -> Response {
    let name = json!(app.info.id).to_string();
    body::typed("application/json", include_str!("../../page/openapi.json").replace("\"{model}\"", &name))
}

/// `GET /v1/models`
pub async fn models(State(app): State<Arc<App>>, Caller(_): Caller) -> Response {
    let info = &app.info;
    body::json(&json!({"object": "list", "data": [{
        "id": info.id, "object": "model", "created": 0, "owned_by": "overspill",
        "layers": info.layers, "hidden_size": info.hidden_size, "session_tokens": info.session_tokens,
        "device": info.device,
    }]}))
}
