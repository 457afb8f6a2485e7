//! The routes that generate.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::{Body, Bytes},
    extract::{Path, State},
    response::Response,
};
use futures_util::stream;
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::{
    App, Caller,
    body::{self, Json, Members},
    sessions::Name,
};
use crate::{
    Error, Result,
    keys::Owner,
    progress::Kind,
    reply::{Head, Logprobs},
    request::{self, Delivery},
    worker::{Event, Job, Message, Work, now_s},
};

/// How long a stream may be silent: a comment then shows that both ends are there.
pub const SILENCE: Duration = Duration::from_secs(15);

/// `POST /v1/completions`
pub async fn completions(
    State(app): State<Arc<App>>,
    Caller(owner): Caller,
    Json(body): Json,
) -> Result<Response> {
    generate(&app, owner, &body, Kind::Text).await
}

/// `POST /v1/chat/completions`
pub async fn chat(State(app): State<Arc<App>>, Caller(owner): Caller, Json(body): Json) -> Result<Response> {
    generate(&app, owner, &body, Kind::Chat).await
}

/// `POST /v1/sessions/{id}/resume`: the rest of a paused generation, as its own route would answer.
pub async fn resume(
    State(app): State<Arc<App>>,
    Caller(owner): Caller,
    Path(name): Name,
    Members(mut fields): Members,
) -> Result<Response> {
    let delivery = request::delivery(&mut fields)?;
    answer(&app, owner, Work::Resume { name }, delivery).await
}

async fn generate(app: &Arc<App>, owner: Owner, body: &[u8], kind: Kind) -> Result<Response> {
    let wanted = request::generate(body, kind, &app.info.id, &app.limits)?;
    let delivery = wanted.delivery;
    answer(app, owner, Work::Begin(wanted), delivery).await
}

/// Waits for the request's turn, so that what is wrong with it has a status of its own; then answers
/// at once or piece by piece. Dropping the answer gives the generation up.
async fn answer(app: &Arc<App>, owner: Owner, work: Work, delivery: Delivery) -> Result<Response> {
    let ticket = app.gate.enter(&owner, &app.limits)?;
    let (events, mut source) = unbounded_channel();
    let since = Instant::now();
    app.tell(Message::Generate(Box::new(Job { owner, work, events, ticket, since })))?;
    let head = match source.recv().await {
        Some(Event::Started { kind, name }) => Head::new(kind, &app.info.id, name, now_s()),
        Some(Event::Failed(error)) => return Err(error),
        _ => return Err(Error::ShuttingDown),
    };
    if delivery.stream {
        return Ok(body::typed("text/event-stream", chunks(head, source, delivery.usage)));
    }
    let (mut whole, mut logprobs) = (String::new(), Logprobs::default());
    loop {
        match source.recv().await {
            Some(Event::Piece { text, logprob }) => {
                whole.push_str(&text);
                logprob.into_iter().for_each(|logprob| logprobs.push(logprob));
            }
            Some(Event::Done(done)) => return Ok(body::json(&head.whole(&whole, &logprobs, &done))),
            Some(Event::Failed(error)) => return Err(error),
            Some(Event::Started { .. }) => {}
            None => return Err(Error::ShuttingDown),
        }
    }
}

/// Server-sent events, to the end.
fn chunks(head: Head, source: UnboundedReceiver<Event>, usage: bool) -> Body {
    let opening = head.opening().map(|value| event(&value));
    let rest = stream::unfold((head, Some(source)), move |(head, source)| async move {
        let mut source = source?;
        let bytes = match tokio::time::timeout(SILENCE, source.recv()).await {
            Err(_) => Bytes::from_static(b": still here\n\n"),
            Ok(Some(Event::Piece { text, logprob })) => {
                let mut logprobs = Logprobs::default();
                logprob.into_iter().for_each(|logprob| logprobs.push(logprob));
                event(&head.piece(&text, &logprobs))
            }
            Ok(Some(Event::Started { .. })) => Bytes::from_static(b": started\n\n"),
            Ok(Some(Event::Done(done))) => {
                let last = [Some(head.closing(&done)), usage.then(|| head.usage(&done))];
                let mut bytes: Vec<u8> =
                    last.iter().flatten().flat_map(|value| event(value).to_vec()).collect();
                bytes.extend_from_slice(b"data: [DONE]\n\n");
                return Some((Ok(Bytes::from(bytes)), (head, None)));
            }
            Ok(Some(Event::Failed(error))) => return Some((Ok(event(&error.to_json())), (head, None))),
            Ok(None) => return Some((Ok(event(&Error::ShuttingDown.to_json())), (head, None))),
        };
        Some((Ok::<_, std::convert::Infallible>(bytes), (head, Some(source))))
    });
    let first = stream::iter(opening.map(Ok));
    Body::from_stream(futures_util::StreamExt::chain(first, rest))
}

fn event(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}
