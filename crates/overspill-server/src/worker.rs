//! The loop that runs the model: takes messages, gives out turns, steps, and passes on what came.
//!
//! Everything of a [`Worker`] happens on one thread, between steps or in one; a message is looked at after
//! at most one step. Who has a seat in the steps is in `seats`, how sessions are kept in `keeping`.

use std::{
    sync::{Arc, mpsc::Receiver},
    time::Instant,
};

use tokio::sync::{mpsc::UnboundedSender, oneshot};

use crate::{
    Command, Error, Executor, Limits, ModelInfo, Result, StepOutcome, Token,
    control::Control,
    executor::Logprob,
    gate::Ticket,
    keys::Owner,
    ledger::Ledger,
    live::Live,
    metrics::Metrics,
    progress::{Kind, Progress},
    queue::FairQueue,
    reply::Done,
    request::Generate,
    seats::Waiting,
    table::{Rest, State, Table},
};

/// What connections ask of the worker.
pub enum Message {
    /// To generate.
    Generate(Box<Job>),
    /// Something about sessions.
    Control(Box<Control>),
    /// Where everything is.
    Report(oneshot::Sender<Result<Live>>),
    /// To end.
    End,
}

/// A request to generate.
pub struct Job {
    /// Whose.
    pub owner: Owner,
    /// What.
    pub work: Work,
    /// To whom it goes; once nobody reads it, the request is given up.
    pub events: UnboundedSender<Event>,
    /// Its right to be here.
    pub ticket: Ticket,
    /// When it came.
    pub since: Instant,
}

/// What a request is for.
pub enum Work {
    /// A generation.
    Begin(Generate),
    /// The rest of one.
    Resume {
        /// The session.
        name: String,
    },
}

/// What comes of a request.
#[derive(Debug)]
pub enum Event {
    /// It has a seat.
    Started {
        /// Which route its generation came by.
        kind: Kind,
        /// The session.
        name: Option<String>,
    },
    /// Text, and the token it came with.
    Piece {
        /// May be empty.
        text: String,
        /// Where asked for.
        logprob: Option<Logprob>,
    },
    /// It is over, or paused.
    Done(Done),
    /// It failed.
    Failed(Error),
}

/// A request that has had a seat.
pub(crate) struct Active {
    pub key: u64,
    pub owner: Owner,
    pub progress: Progress,
    pub events: UnboundedSender<Event>,
    /// Held until the request is over.
    pub _ticket: Ticket,
    /// Tokens since it got its seat, and in all.
    pub tokens: (usize, u64),
    /// Where it stood before a resume that has not made a step yet.
    pub stands: Option<Option<usize>>,
}

/// See the module.
pub struct Worker<'a> {
    pub(crate) executor: &'a mut dyn Executor,
    pub(crate) info: ModelInfo,
    pub(crate) limits: Limits,
    pub(crate) table: Table,
    pub(crate) ledger: Option<Ledger>,
    pub(crate) metrics: Arc<Metrics>,
    inbox: Receiver<Message>,
    pub(crate) queue: FairQueue<Waiting>,
    pub(crate) running: Vec<Active>,
    /// Requests with a seat whose sessions are on their way to the device, by the session's number.
    pub(crate) coming: Vec<(u64, Waiting)>,
    pub(crate) ending: Option<Instant>,
    pub(crate) swept: Instant,
}

impl<'a> Worker<'a> {
    /// A worker without sessions.
    pub fn new(
        executor: &'a mut dyn Executor,
        info: ModelInfo,
        limits: Limits,
        metrics: Arc<Metrics>,
        inbox: Receiver<Message>,
    ) -> Self {
        Self {
            executor,
            info,
            limits,
            table: Table::default(),
            ledger: None,
            metrics,
            inbox,
            queue: FairQueue::default(),
            running: Vec::new(),
            coming: Vec::new(),
            ending: None,
            swept: Instant::now(),
        }
    }

    /// Runs until it is told to end, or nobody can tell it any more.
    pub fn run(&mut self) {
        loop {
            while let Some(message) = self.next() {
                self.take(message);
            }
            if let Some(since) = self.ending {
                let over = since.elapsed().as_secs_f64() > self.limits.grace_s;
                if over {
                    self.give_up();
                }
                if self.is_idle() {
                    return;
                }
            }
            self.sweep();
            self.admit();
            self.step();
            self.metrics.set_queue(self.queue.len() + self.coming.len(), self.running.len());
        }
    }

    fn is_idle(&self) -> bool {
        self.running.is_empty() && self.coming.is_empty() && self.queue.len() == 0
    }

    /// A message if there is one; waits for one where nothing else is to be done.
    fn next(&mut self) -> Option<Message> {
        if !self.is_idle() || self.ending.is_some() {
            return self.inbox.try_recv().ok();
        }
        Some(self.inbox.recv().unwrap_or(Message::End))
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Generate(job) => self.enqueue(*job),
            Message::Control(control) => self.control(*control),
            Message::Report(reply) => drop(reply.send(self.report())),
            Message::End => self.end(),
        }
    }

    /// One step of all that have a seat and are there.
    pub(crate) fn step(&mut self) {
        self.pause_between_tokens();
        if self.running.is_empty() {
            return;
        }
        let table = &mut self.table;
        let mut layer = |active: &Active| {
            let armed = table.get_mut(active.key).and_then(|entry| entry.armed.flatten());
            // One that stands within a forward goes on with it first.
            armed.filter(|_| !matches!(active.stands, Some(Some(_))))
        };
        let steps: Vec<_> = self.running.iter().map(|active| (active.key, layer(active))).collect();
        for (key, _) in &steps {
            self.changed(*key);
        }
        let begin = Instant::now();
        let outcomes = self.executor.step(&steps);
        self.metrics.step(begin.elapsed(), steps.len());
        let outcomes = match outcomes {
            Ok(outcomes) if outcomes.len() == steps.len() => outcomes,
            other => {
                let message =
                    other.err().map_or("a step had too few outcomes".to_owned(), |error| error.to_string());
                let failed = || StepOutcome::Failed(Error::Internal { message: message.clone() });
                steps.iter().map(|_| failed()).collect()
            }
        };
        for (active, outcome) in std::mem::take(&mut self.running).into_iter().zip(outcomes) {
            match outcome {
                StepOutcome::Token(token) => self.go_on(active, token),
                StepOutcome::Paused(layer) => self.suspend(active, Some(layer)),
                StepOutcome::Failed(error) => self.failed(active, error),
            }
        }
    }

    fn pause_between_tokens(&mut self) {
        for active in std::mem::take(&mut self.running) {
            let armed = self.table.get_mut(active.key).and_then(|entry| entry.armed);
            match (armed, active.stands) {
                // One that stands within a forward has to end it first.
                (Some(None), None | Some(None)) => self.suspend(active, None),
                _ => self.running.push(active),
            }
        }
    }

    /// After a token: over, given up, or on.
    fn go_on(&mut self, mut active: Active, token: Token) {
        active.stands = None;
        active.tokens = (active.tokens.0 + 1, active.tokens.1 + 1);
        active.progress.left = active.progress.left.saturating_sub(1);
        self.metrics.token();
        let (text, hit) = active.progress.push(&token.text);
        let said = !text.is_empty() || token.logprob.is_some();
        if said {
            let _ = active.events.send(Event::Piece { text, logprob: token.logprob });
        }
        if hit || token.end || active.progress.left == 0 {
            self.finish(active, if hit || token.end { "stop" } else { "length" });
        } else if active.events.is_closed() {
            self.over(active.key, State::Idle);
        } else if active.tokens.0 >= self.limits.turn_tokens && self.queue.len() > 0 {
            active.tokens.0 = 0;
            self.unseat(active.key);
            self.queue.push(active.owner.clone(), Waiting::Again(active));
        } else {
            self.running.push(active);
        }
    }

    fn finish(&mut self, mut active: Active, reason: &'static str) {
        let (text, calls) = active.progress.finish();
        if !text.is_empty() {
            let _ = active.events.send(Event::Piece { text, logprob: None });
        }
        let finish = if calls.is_some() { "tool_calls" } else { reason };
        let state = if calls.is_some() { State::Waiting } else { State::Idle };
        self.over(active.key, state);
        if calls.is_some()
            && let Some(eta_ms) = active.progress.params.tool_eta_ms
            && self.table.get_mut(active.key).is_some()
            && let Err(error) = self.executor.command(&Command::IoWait { key: active.key, eta_ms })
        {
            eprintln!("overspill: session {} stays where it is: {error}", active.key);
        }
        let _ = active.events.send(Event::Done(done(&active, finish, calls)));
    }

    /// A session whose generation is over.
    fn over(&mut self, key: u64, state: State) {
        if let Err(error) = self.executor.command(&Command::Finish { key }) {
            eprintln!("overspill: session {key}: {error}");
        }
        if let Some(entry) = self.table.get_mut(key) {
            entry.state = state;
        }
        self.close_nameless(key);
    }

    /// Leaves a session where it stands, with what is left of its generation.
    pub(crate) fn suspend(&mut self, active: Active, layer: Option<usize>) {
        let done = done(&active, "paused", None);
        let Active { key, progress, events, .. } = active;
        self.unseat(key);
        if let Some(entry) = self.table.get_mut(key) {
            entry.rest = Some(Rest { progress, layer });
            entry.armed = None;
            entry.rest();
        }
        let _ = events.send(Event::Done(done));
    }

    pub(crate) fn failed(&mut self, active: Active, error: Error) {
        let Active { key, progress, events, stands, .. } = active;
        match (self.table.get_mut(key), stands) {
            // A resume that fails leaves the session paused there still.
            (Some(entry), Some(layer)) => {
                entry.rest = Some(Rest { progress, layer });
                entry.rest();
                self.unseat(key);
            }
            _ => self.over(key, State::Idle),
        }
        fail(&events, error);
    }
}

fn done(active: &Active, finish: &'static str, calls: Option<Vec<crate::tools::ToolCall>>) -> Done {
    Done { finish, calls, prompt_tokens: active.progress.prompt_tokens, completion_tokens: active.tokens.1 }
}

/// Says that it failed.
pub(crate) fn fail(events: &UnboundedSender<Event>, error: Error) {
    // Nobody may be there to hear it.
    let _ = events.send(Event::Failed(error));
}

/// Seconds since 1970.
pub fn now_s() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
