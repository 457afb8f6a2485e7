//! A server's life: opens, listens, ends in order.
//!
//! The order of an end: no more connections; the worker leaves sessions where they stand and answers
//! with that; connections get a moment to send what they have; sessions are saved; the process is free
//! to go.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Sender},
    },
    time::Duration,
};

use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    signal::unix::{SignalKind, signal},
    sync::Semaphore,
};

use crate::{
    Config, Error, Executor, ModelInfo, Result,
    gate::Gate,
    http::{self, App, Watch},
    keys::Keys,
    ledger::Ledger,
    metrics::Metrics,
    worker::{Message, Worker},
};

/// Most bytes of a request's head.
const HEAD_BYTES: usize = 16 << 10;
/// For answers that are on their way when the server ends.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// After `accept` failed, as it does when there are too many open files.
const BREATH: Duration = Duration::from_millis(100);

/// Serves until SIGTERM or SIGINT, running the model on the calling thread; then saves all sessions.
/// `ready` is told the address.
///
/// # Errors
/// Where the server cannot start, or a session could not be saved.
pub fn serve(
    config: Config,
    info: ModelInfo,
    executor: &mut dyn Executor,
    ready: impl FnOnce(std::net::SocketAddr),
) -> Result<()> {
    let keys = Keys::new(&config.keys);
    let address = config.bind.to_string();
    if keys.is_empty() && !config.bind.ip().is_loopback() {
        return Err(Error::Unprotected { address });
    }
    let refused = |error: std::io::Error| Error::Bind { address: address.clone(), reason: error.to_string() };
    let listener = std::net::TcpListener::bind(config.bind).map_err(refused)?;
    listener.set_nonblocking(true).map_err(refused)?;
    let bound = listener.local_addr().map_err(refused)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(refused)?;

    let metrics = Arc::new(Metrics::default());
    let (inbox, messages) = mpsc::channel();
    let limits = config.limits.clone();
    let mut worker = Worker::new(executor, info.clone(), limits.clone(), Arc::clone(&metrics), messages);
    if let Some(folder) = &config.state_dir {
        let (ledger, found) = Ledger::open(folder)?;
        worker.load(ledger, found);
    }
    let app = Arc::new(App {
        keys,
        limits,
        info,
        gate: Gate::default(),
        worker: inbox.clone(),
        metrics,
        watch: Watch::default(),
        is_ending: AtomicBool::new(false),
    });
    let (ended, end) = mpsc::channel::<()>();
    let connections = std::thread::Builder::new()
        .name("overspill-http".to_owned())
        .spawn(move || runtime.block_on(listen(listener, app, &inbox, end)))
        .map_err(refused)?;
    ready(bound);
    worker.run();
    drop(ended);
    let outcome = connections.join().unwrap_or_else(|_| {
        Err(Error::Internal { message: "the thread of the connections ended in a panic".to_owned() })
    });
    let lost = if config.state_dir.is_some() { worker.save_all() } else { 0 };
    outcome?;
    if lost > 0 {
        return Err(Error::Internal { message: format!("{lost} sessions could not be saved") });
    }
    Ok(())
}

async fn listen(
    listener: std::net::TcpListener,
    app: Arc<App>,
    worker: &Sender<Message>,
    ended: mpsc::Receiver<()>,
) -> Result<()> {
    let refused = |error: std::io::Error| Error::Bind { address: String::new(), reason: error.to_string() };
    let listener = TcpListener::from_std(listener).map_err(refused)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(refused)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(refused)?;
    let service = TowerToHyperService::new(http::router(Arc::clone(&app)));
    let places = Arc::new(Semaphore::new(app.limits.connections));
    let graceful = GracefulShutdown::new();
    tokio::spawn(http::look(Arc::clone(&app)));
    loop {
        let stream = tokio::select! {
            stream = accept(&listener, &places) => stream,
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        };
        let Some((stream, place)) = stream else { continue };
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(Duration::from_secs_f64(app.limits.header_s))
            .max_buf_size(HEAD_BYTES)
            .serve_connection(TokioIo::new(stream), service.clone());
        let connection = graceful.watch(connection);
        let metrics = Arc::clone(&app.metrics);
        tokio::spawn(async move {
            metrics.connections.fetch_add(1, Ordering::Relaxed);
            // A connection that breaks is its client's business.
            let _ = connection.await;
            metrics.connections.fetch_sub(1, Ordering::Relaxed);
            drop(place);
        });
    }
    drop(listener);
    app.is_ending.store(true, Ordering::Relaxed);
    let _ = worker.send(Message::End);
    // The worker lets go of its end of this channel when nothing runs any more.
    let _ = tokio::task::spawn_blocking(move || ended.recv()).await;
    let _ = tokio::time::timeout(LAST_WORDS, graceful.shutdown()).await;
    Ok(())
}

/// The next connection, once there is a place for it.
fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> impl Future<Output = Option<(TcpStream, tokio::sync::OwnedSemaphorePermit)>> {
    let places = Arc::clone(places);
    async move {
        let place = places.acquire_owned().await.ok()?;
        match listener.accept().await {
            Ok((stream, _)) => {
                // Tokens are small and are wanted at once.
                let _ = stream.set_nodelay(true);
                Some((stream, place))
            }
            Err(_) => {
                tokio::time::sleep(BREATH).await;
                None
            }
        }
    }
}
