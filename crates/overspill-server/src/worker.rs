//! The loop that runs the model: takes messages, gives out turns, steps, and passes on what came.
//!
//! Everything here happens on one thread, between steps or in one; a message is looked at after at
//! most one step. Up to [`Worker::seats`] requests run at once: as many as the device holds sessions,
//! so that a step never waits for a swap. The others wait for a seat, the owner with the fewest
//! first, and one that has had its tokens of a turn gives its seat to them.

use std::{
    sync::{Arc, mpsc::Receiver},
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::sync::{mpsc::UnboundedSender, oneshot};

use crate::{
    Command, Error, Executor, Limits, ModelInfo, Result, StepOutcome, Token,
    control::Control,
    executor::Logprob,
    gate::Ticket,
    keys::Owner,
    ledger::{Ledger, Saved},
    live::Live,
    metrics::Metrics,
    progress::{Kind, Progress},
    queue::FairQueue,
    reply::Done,
    request::Generate,
    table::{Entry, Rest, State, Table},
};

/// Seconds between looks for requests that have waited too long, or whose client is gone.
const SWEEP: Duration = Duration::from_millis(250);

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
struct Active {
    key: u64,
    owner: Owner,
    progress: Progress,
    events: UnboundedSender<Event>,
    /// Held until the request is over.
    _ticket: Ticket,
    /// Tokens since it got its seat, and in all.
    tokens: (usize, u64),
    /// Where it stood before a resume that has not made a step yet.
    stands: Option<Option<usize>>,
}

enum Waiting {
    New(Job, Option<u64>),
    Again(Active),
}

/// See the module.
pub struct Worker<'a> {
    pub(crate) executor: &'a mut dyn Executor,
    pub(crate) info: ModelInfo,
    pub(crate) limits: Limits,
    pub(crate) table: Table,
    pub(crate) ledger: Option<Ledger>,
    metrics: Arc<Metrics>,
    inbox: Receiver<Message>,
    queue: FairQueue<Waiting>,
    running: Vec<Active>,
    ending: Option<Instant>,
    swept: Instant,
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
                if self.running.is_empty() && self.queue.len() == 0 {
                    return;
                }
            }
            self.sweep();
            self.admit();
            self.step();
            self.metrics.set_queue(self.queue.len(), self.running.len());
        }
    }

    /// Requests that run at once.
    fn seats(&self) -> usize {
        self.info.slabs.min(self.limits.batch).max(1)
    }

    /// A message if there is one; waits for one where nothing else is to be done.
    fn next(&mut self) -> Option<Message> {
        let is_idle = self.running.is_empty() && self.queue.len() == 0 && self.ending.is_none();
        if !is_idle {
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

    // ---- turns ---------------------------------------------------------------------------------

    /// Looks whether a request can be done at all, and puts it behind the others of its owner.
    fn enqueue(&mut self, job: Job) {
        if self.ending.is_some() {
            return fail(&job.events, Error::ShuttingDown);
        }
        let (name, resumes) = match &job.work {
            Work::Begin(generate) => (generate.session.as_deref(), false),
            Work::Resume { name } => (Some(name.as_str()), true),
        };
        let key = match name.map(|name| self.claim(&job.owner, name, resumes)) {
            Some(Err(error)) => return fail(&job.events, error),
            Some(Ok(key)) => Some(key),
            None => None,
        };
        self.queue.push(job.owner.clone(), Waiting::New(job, key));
    }

    fn claim(&mut self, owner: &Owner, name: &str, resumes: bool) -> Result<u64> {
        let entry = self.table.find(owner, name)?;
        entry.at_rest()?;
        match (resumes, entry.rest.is_some()) {
            (true, false) => return Err(entry.conflict("is not paused")),
            (false, true) => return Err(entry.conflict("is paused: resume it first")),
            _ => {}
        }
        entry.state = State::Queued;
        Ok(entry.key)
    }

    fn admit(&mut self) {
        while self.running.len() < self.seats() {
            let running = &self.running;
            let held = |owner: &Owner| running.iter().filter(|active| active.owner == *owner).count();
            match self.queue.pop(held) {
                None => return,
                Some(Waiting::Again(active)) => self.running.push(active),
                Some(Waiting::New(job, key)) => self.start(job, key),
            }
        }
    }

    /// Gives a request its seat.
    fn start(&mut self, job: Job, key: Option<u64>) {
        let Job { owner, work, events, ticket, .. } = job;
        let began = match work {
            Work::Begin(generate) => self.begin(&owner, key, generate),
            Work::Resume { .. } => self.take_up(key),
        };
        let (key, progress, stands) = match began {
            Ok(began) => began,
            Err(error) => {
                if let Some(entry) = key.and_then(|key| self.table.get_mut(key)) {
                    entry.rest();
                }
                return fail(&events, error);
            }
        };
        let mut name = None;
        if let Some(entry) = self.table.get_mut(key) {
            entry.state = State::Running;
            name.clone_from(&entry.name);
        }
        let _ = events.send(Event::Started { kind: progress.params.kind, name });
        let active = Active { key, owner, progress, events, _ticket: ticket, tokens: (0, 0), stands };
        self.running.push(active);
    }

    fn begin(
        &mut self,
        owner: &Owner,
        key: Option<u64>,
        generate: Generate,
    ) -> Result<(u64, Progress, Option<Option<usize>>)> {
        let Generate { prompt, params, exact, .. } = generate;
        let key = key.map_or_else(|| self.open(owner, None, exact), Ok)?;
        let began = self.executor.command(&Command::Begin {
            key,
            prompt: &prompt,
            max_tokens: params.max_tokens,
            open_ended: params.open_ended,
            temperature: params.temperature,
            top_p: params.top_p,
            seed: params.seed,
            logprobs: params.logprobs,
        });
        let began = began.inspect_err(|_| self.close_nameless(key))?;
        let count = |name: &str| began.get(name).and_then(Value::as_u64).unwrap_or(0);
        let prompt_tokens = (count("prompt_tokens"), count("cached_tokens"));
        self.metrics.prompt(prompt_tokens.0 - prompt_tokens.1.min(prompt_tokens.0));
        Ok((key, Progress::new(params, prompt_tokens, count("max_tokens") as usize), None))
    }

    fn take_up(&mut self, key: Option<u64>) -> Result<(u64, Progress, Option<Option<usize>>)> {
        let entry = key.and_then(|key| self.table.get_mut(key));
        let found = entry.and_then(|entry| entry.rest.take().map(|rest| (entry.key, rest)));
        let (key, rest) = found.ok_or_else(|| Error::NoSession { id: String::new() })?;
        Ok((key, rest.progress, Some(rest.layer)))
    }

    /// Adds a session.
    pub(crate) fn open(&mut self, owner: &Owner, name: Option<String>, exact: bool) -> Result<u64> {
        let key = self.table.new_key();
        self.executor.command(&Command::Open { key, exact })?;
        self.enter(key, owner, name)
    }

    /// Enters a session that the executor has.
    pub(crate) fn enter(&mut self, key: u64, owner: &Owner, name: Option<String>) -> Result<u64> {
        let created = now_s();
        if let (Some(ledger), Some(name)) = (&mut self.ledger, &name)
            && let Err(error) = ledger.opened(key, owner, name, created)
        {
            self.executor.command(&Command::Close { key })?;
            return Err(error);
        }
        self.table.insert(Entry {
            key,
            owner: owner.clone(),
            name,
            created,
            state: State::Idle,
            rest: None,
            armed: None,
            is_dirty: true,
            rolled_back: false,
        });
        Ok(key)
    }

    fn close_nameless(&mut self, key: u64) {
        if self.table.get_mut(key).is_some_and(|entry| entry.name.is_none()) {
            self.table.remove(key);
            if let Err(error) = self.executor.command(&Command::Close { key }) {
                eprintln!("overspill: session {key} did not end: {error}");
            }
        }
    }

    // ---- steps ---------------------------------------------------------------------------------

    fn step(&mut self) {
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

    /// Notes in the ledger that a session is not any more what was saved.
    pub(crate) fn changed(&mut self, key: u64) {
        let Some(entry) = self.table.get_mut(key) else { return };
        if !entry.is_dirty {
            entry.is_dirty = true;
            if let Some(Err(error)) = self.ledger.as_mut().map(|ledger| ledger.dirty(key)) {
                eprintln!("overspill: {error}");
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
    fn suspend(&mut self, active: Active, layer: Option<usize>) {
        let done = done(&active, "paused", None);
        let Active { key, progress, events, .. } = active;
        if let Some(entry) = self.table.get_mut(key) {
            entry.rest = Some(Rest { progress, layer });
            entry.armed = None;
            entry.rest();
        }
        let _ = events.send(Event::Done(done));
    }

    fn failed(&mut self, active: Active, error: Error) {
        let Active { key, progress, events, stands, .. } = active;
        match (self.table.get_mut(key), stands) {
            // A resume that fails leaves the session paused there still.
            (Some(entry), Some(layer)) => {
                entry.rest = Some(Rest { progress, layer });
                entry.rest();
            }
            _ => self.over(key, State::Idle),
        }
        fail(&events, error);
    }

    // ---- endings -------------------------------------------------------------------------------

    /// Gives up requests that wait and whose client is gone, or that have waited too long.
    fn sweep(&mut self) {
        if self.swept.elapsed() < SWEEP {
            return;
        }
        self.swept = Instant::now();
        let limit_s = self.limits.queue_s;
        let gone = self.queue.take(|waiting| match waiting {
            Waiting::New(job, _) => job.events.is_closed() || job.since.elapsed().as_secs_f64() > limit_s,
            Waiting::Again(active) => active.events.is_closed(),
        });
        self.drop_waiting(gone, &Error::QueueTimeout { limit_s });
    }

    /// Stops whatever a session is doing, so that it can be closed.
    pub(crate) fn cancel(&mut self, key: u64) {
        let error = Error::Conflict { message: "the session was deleted".to_owned() };
        let waiting = self.queue.take(|waiting| match waiting {
            Waiting::New(_, found) => *found == Some(key),
            Waiting::Again(active) => active.key == key,
        });
        self.drop_waiting(waiting, &error);
        for active in std::mem::take(&mut self.running) {
            if active.key == key { self.failed(active, error.clone()) } else { self.running.push(active) }
        }
    }

    fn drop_waiting(&mut self, gone: Vec<Waiting>, error: &Error) {
        for waiting in gone {
            match waiting {
                Waiting::New(job, key) => {
                    if let Some(entry) = key.and_then(|key| self.table.get_mut(key)) {
                        entry.rest();
                    }
                    fail(&job.events, error.clone());
                }
                Waiting::Again(active) => self.failed(active, error.clone()),
            }
        }
    }

    /// Begins to end: what has a session is left where it stands, what has none may go on for a while.
    fn end(&mut self) {
        self.ending.get_or_insert_with(Instant::now);
        let waiting = self.queue.take(|_| true);
        let mut left = std::mem::take(&mut self.running);
        for one in waiting {
            match one {
                Waiting::Again(active) => left.push(active),
                new @ Waiting::New(..) => self.drop_waiting(vec![new], &Error::ShuttingDown),
            }
        }
        for active in left {
            let is_named = self.table.get_mut(active.key).is_some_and(|entry| entry.name.is_some());
            match (is_named, active.stands) {
                (true, layer) => self.suspend(active, layer.flatten()),
                (false, _) => self.running.push(active),
            }
        }
    }

    /// No more time for what has no session.
    fn give_up(&mut self) {
        for active in std::mem::take(&mut self.running) {
            self.failed(active, Error::ShuttingDown);
        }
        let waiting = self.queue.take(|_| true);
        self.drop_waiting(waiting, &Error::ShuttingDown);
    }

    // ---- saved sessions ------------------------------------------------------------------------

    /// Saves one session.
    pub(crate) fn save(&mut self, key: u64) -> Result<()> {
        let Some(ledger) = &mut self.ledger else {
            return Err(Error::Conflict { message: "the server has no --state-dir to save to".to_owned() });
        };
        let Some(entry) = self.table.get_mut(key) else { return Ok(()) };
        let (file, path) = ledger.path_for(key);
        let record = self.executor.command(&Command::Save { key, path: &path })?;
        let progress = entry.rest.as_ref().map(|rest| rest.progress.clone());
        ledger.saved(key, Saved { file, record, state: entry.state, progress })?;
        entry.is_dirty = false;
        Ok(())
    }

    /// Saves all sessions that have a name; how many could not be.
    pub fn save_all(&mut self) -> usize {
        let keys: Vec<u64> = self
            .table
            .iter()
            .filter(|entry| entry.name.is_some() && entry.is_dirty && entry.state != State::Lost)
            .map(|entry| entry.key)
            .collect();
        let mut lost = 0;
        for key in keys {
            if let Err(error) = self.save(key) {
                eprintln!("overspill: session {key} is not saved: {error}");
                lost += 1;
            }
        }
        lost
    }

    /// Takes up what a ledger has.
    pub fn load(&mut self, ledger: Ledger, found: Vec<crate::ledger::Opened>) {
        for session in found {
            let key = session.key;
            let loaded = session.saved.as_ref().map(|saved| {
                let path = ledger.path_of(&saved.file);
                self.executor.command(&Command::Load { key, path: &path, record: &saved.record })
            });
            if let Some(Err(error)) = &loaded {
                eprintln!("overspill: session {:?} is not loaded: {error}", session.name);
            }
            let (state, rest) = match (session.saved, loaded) {
                (Some(saved), Some(Ok(_))) => {
                    let layer = if let State::Paused { layer } = saved.state { layer } else { None };
                    (saved.state, saved.progress.map(|progress| Rest { progress, layer }))
                }
                _ => (State::Lost, None),
            };
            self.table.insert(Entry {
                key,
                owner: session.owner,
                name: Some(session.name),
                created: session.created,
                state,
                rest,
                armed: None,
                is_dirty: false,
                rolled_back: session.is_dirty && state != State::Lost,
            });
        }
        self.ledger = Some(ledger);
    }

    fn report(&mut self) -> Result<Live> {
        let report = self.executor.command(&Command::Report {})?;
        Ok(Live::new(&report, &self.table, &self.info, self.metrics.tokens()))
    }
}

fn done(active: &Active, finish: &'static str, calls: Option<Vec<crate::tools::ToolCall>>) -> Done {
    Done { finish, calls, prompt_tokens: active.progress.prompt_tokens, completion_tokens: active.tokens.1 }
}

fn fail(events: &UnboundedSender<Event>, error: Error) {
    // Nobody may be there to hear it.
    let _ = events.send(Event::Failed(error));
}

/// Seconds since 1970.
pub fn now_s() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
