//! Connections: who may ask what, and how answers look on the wire.

mod body;
mod generate;
mod meta;
mod sessions;
mod watch;

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
};

use axum::{
    Router,
    extract::{FromRequestParts, MatchedPath, Request, State},
    http::{HeaderMap, HeaderValue, header, request::Parts},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use tokio::sync::oneshot;

use crate::{
    Error, Limits, ModelInfo, Result,
    control::{Act, Answer, Control},
    gate::Gate,
    keys::{Keys, Owner},
    metrics::Metrics,
    worker::Message,
};

pub use watch::{Watch, look};

/// What every connection shares.
pub struct App {
    /// Who is let in.
    pub keys: Keys,
    /// What nobody may exceed.
    pub limits: Limits,
    /// What is served.
    pub info: ModelInfo,
    /// Requests that generate or wait to.
    pub gate: Gate,
    /// The worker.
    pub worker: Sender<Message>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// The live view.
    pub watch: Watch,
    /// Whether the server is ending.
    pub is_ending: AtomicBool,
}

/// All routes.
pub fn router(app: Arc<App>) -> Router {
    let one = "/v1/sessions/{id}";
    let deed = |name: &str| format!("{one}/{name}");
    Router::new()
        .route("/", get(meta::page))
        .route("/page.css", get(meta::css))
        .route("/page.js", get(meta::js))
        .route("/healthz", get(meta::health))
        .route("/metrics", get(meta::metrics))
        .route("/openapi.json", get(meta::openapi))
        .route("/v1/models", get(meta::models))
        .route("/v1/events", get(watch::events))
        .route("/v1/completions", post(generate::completions))
        .route("/v1/chat/completions", post(generate::chat))
        .route("/v1/sessions", get(sessions::list).post(sessions::create))
        .route(one, get(sessions::get).delete(sessions::delete))
        .route(&deed("pause"), post(sessions::pause))
        .route(&deed("resume"), post(generate::resume))
        .route(&deed("fork"), post(sessions::fork))
        .route(&deed("io_wait"), post(sessions::io_wait))
        .route(&deed("steer"), post(sessions::steer))
        .route(&deed("save"), post(sessions::save))
        .route(&deed("hidden"), get(sessions::hidden).put(sessions::set_hidden))
        .method_not_allowed_fallback(|| async { Error::NoMethod })
        .fallback(|| async { Error::NoRoute })
        .layer(middleware::from_fn_with_state(Arc::clone(&app), around))
        .with_state(app)
}

/// Around every request: who asks from where, what is counted, and what every answer says.
async fn around(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let mut response = match same_site(&app, request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    app.metrics.request(&route, response.status().as_u16());
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// A browser sends its page's origin along. Without keys, a page of another site could otherwise use the
/// server that listens on its visitor's own machine, also under a name that it makes point there.
fn same_site(app: &App, headers: &HeaderMap) -> Result<()> {
    let host = headers.get(header::HOST).map_or(&b""[..], HeaderValue::as_bytes);
    if let Some(origin) = headers.get(header::ORIGIN) {
        let origin = origin.as_bytes();
        let site = origin.strip_prefix(b"http://").or(origin.strip_prefix(b"https://"));
        if site != Some(host) {
            return Err(Error::ForeignSite);
        }
    }
    if app.keys.is_empty() && !is_loopback(host) { Err(Error::ForeignSite) } else { Ok(()) }
}

/// Whether `host`, with or without a port, names this machine by itself. A name that only looks like an
/// address, such as 127.example.org, is anybody's and may point here.
fn is_loopback(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, _)) if !host.ends_with(']') => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name.is_empty() || name == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// Whose key a request has.
pub struct Caller(pub Owner);

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self> {
        app.keys.owner(&parts.headers).map(Self)
    }
}

impl App {
    /// Asks the worker about sessions.
    async fn control(&self, owner: Owner, act: Act) -> Result<Answer> {
        let (reply, answer) = oneshot::channel();
        self.tell(Message::Control(Box::new(Control { owner, act, reply })))?;
        answer.await.map_err(|_| Error::ShuttingDown)?
    }

    /// Sends the worker a message.
    fn tell(&self, message: Message) -> Result<()> {
        if self.is_ending.load(Ordering::Relaxed) {
            return Err(Error::ShuttingDown);
        }
        self.worker.send(message).map_err(|_| Error::ShuttingDown)
    }
}

#[cfg(test)]
mod tests {
    use super::is_loopback;

    #[test]
    fn names_that_only_look_local_are_not() {
        for local in ["", "localhost", "localhost:8000", "127.0.0.1", "127.3.2.1:80", "[::1]", "[::1]:8000"] {
            assert!(is_loopback(local.as_bytes()), "{local:?}");
        }
        let foreign: [&[u8]; 7] = [
            b"127.example.org",
            b"127.0.0.1.example.org:80",
            b"localhost.example.org",
            b"10.0.0.1",
            b"[fe80::1]:80",
            b"example.org:8000",
            b"\xff",
        ];
        for foreign in foreign {
            assert!(!is_loopback(foreign), "{foreign:?}");
        }
    }
}
