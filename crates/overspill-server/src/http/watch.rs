//! The live view: what the worker reports, looked at twice a second while anybody watches.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    extract::State,
    response::Response,
};
use futures_util::stream;
use tokio::sync::{Notify, oneshot, watch};

use super::{App, Caller, body, generate::SILENCE};
use crate::{Error, Result, live::Live, worker::Message};

/// Between two looks.
const PERIOD: Duration = Duration::from_millis(500);
/// A worker in a long prefill answers late; the last report does until then.
const PATIENCE: Duration = Duration::from_millis(200);

/// See the module.
pub struct Watch {
    latest: watch::Sender<Option<Arc<Live>>>,
    watchers: Arc<AtomicUsize>,
    first: Notify,
}

impl Default for Watch {
    fn default() -> Self {
        Self { latest: watch::Sender::new(None), watchers: Arc::default(), first: Notify::new() }
    }
}

/// Counts as a watcher until it is dropped.
struct Watching(Arc<AtomicUsize>);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Looks as long as the server runs.
pub async fn look(app: Arc<App>) {
    loop {
        while app.watch.watchers.load(Ordering::Relaxed) == 0 {
            app.watch.first.notified().await;
        }
        if report(&app).await.is_err() {
            return;
        }
        tokio::time::sleep(PERIOD).await;
    }
}

/// Asks the worker for a report.
async fn report(app: &App) -> Result<Arc<Live>> {
    let (reply, answer) = oneshot::channel();
    app.tell(Message::Report(reply))?;
    let live = Arc::new(answer.await.map_err(|_| Error::ShuttingDown)??);
    app.watch.latest.send_replace(Some(Arc::clone(&live)));
    Ok(live)
}

/// A report, or the last one if a new one takes long.
pub async fn recent(app: &Arc<App>) -> Option<Arc<Live>> {
    match tokio::time::timeout(PATIENCE, report(app)).await {
        Ok(Ok(live)) => Some(live),
        _ => app.watch.latest.borrow().clone(),
    }
}

/// `GET /v1/events`: a report at once and whenever there is a new one.
pub async fn events(State(app): State<Arc<App>>, Caller(owner): Caller) -> Result<Response> {
    let watchers = Arc::clone(&app.watch.watchers);
    watchers.fetch_add(1, Ordering::Relaxed);
    let watching = Watching(watchers);
    let mut latest = app.watch.latest.subscribe();
    // The newest there is may be old: it was looked at when somebody last watched.
    latest.mark_unchanged();
    app.watch.first.notify_one();
    let reports = stream::unfold((latest, owner, watching), |(mut latest, owner, watching)| async move {
        let bytes = match tokio::time::timeout(SILENCE, latest.changed()).await {
            Err(_) => Bytes::from_static(b": still here\n\n"),
            Ok(Err(_)) => return None,
            Ok(Ok(())) => {
                let live = latest.borrow_and_update().clone();
                live.map_or(Bytes::from_static(b": nothing yet\n\n"), |live| live.event(&owner))
            }
        };
        Some((Ok::<_, std::convert::Infallible>(bytes), (latest, owner, watching)))
    });
    Ok(body::typed("text/event-stream", Body::from_stream(reports)))
}
