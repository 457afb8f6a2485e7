//! Seats: who runs next, and how a request that waits ends.
//!
//! Up to [`Worker::seats`] requests run at once: as many as the device holds sessions, so that a step never
//! waits for another's slab. The others wait, the owner with the fewest running first; one that has had its
//! tokens of a turn gives its seat to them. Who gets a seat asks the pool's scheduler for the session's place on
//! the device, and joins the steps when it is there; until then the others step without it. With nobody to
//! step meanwhile it starts at once, and its forward waits for each layer alone.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{
    Command, Error, Result,
    keys::Owner,
    progress::Progress,
    request::Generate,
    table::State,
    worker::{Active, Event, Job, Work, Worker, fail},
};

/// Seconds between looks for requests that have waited too long, or whose client is gone.
const SWEEP: Duration = Duration::from_millis(250);

/// A request that does not run.
pub(crate) enum Waiting {
    /// It has not had a seat yet; of the session of this number.
    New(Job, Option<u64>),
    /// It gave its seat to others.
    Again(Active),
}

impl Waiting {
    fn owner(&self) -> &Owner {
        match self {
            Self::New(job, _) => &job.owner,
            Self::Again(active) => &active.owner,
        }
    }
}

/// What a generation goes on with, and where it stood before a resume.
type Began = (Progress, Option<Option<usize>>);

impl Worker<'_> {
    /// Looks whether a request can be done at all, and puts it behind the others of its owner.
    pub(crate) fn enqueue(&mut self, job: Job) {
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

    /// Requests that run at once.
    fn seats(&self) -> usize {
        self.info.slabs.min(self.limits.batch).max(1)
    }

    /// Gives out the free seats, and starts who is on the device.
    pub(crate) fn admit(&mut self) {
        while self.running.len() + self.coming.len() < self.seats() {
            let (running, coming) = (&self.running, &self.coming);
            let held = |owner: &Owner| {
                running
                    .iter()
                    .map(|active| &active.owner)
                    .chain(coming.iter().map(|(_, one)| one.owner()))
                    .filter(|&found| found == owner)
                    .count()
            };
            let Some(waiting) = self.queue.pop(held) else { break };
            self.seat(waiting);
        }
        if self.coming.is_empty() {
            return;
        }
        let mut there = self.there();
        if self.running.is_empty() && !self.coming.iter().any(|(key, _)| there.contains(key)) {
            there.extend(self.coming.first().map(|(key, _)| *key));
        }
        for (key, waiting) in std::mem::take(&mut self.coming) {
            match waiting {
                waiting if !there.contains(&key) => self.coming.push((key, waiting)),
                Waiting::Again(active) => self.running.push(active),
                Waiting::New(job, _) => self.start(job, key),
            }
        }
    }

    /// Gives a request its seat, and asks for its session.
    fn seat(&mut self, waiting: Waiting) {
        let (key, waiting) = match waiting {
            Waiting::New(job, None) => {
                let exact = matches!(&job.work, Work::Begin(generate) if generate.exact);
                match self.open(&job.owner, None, exact) {
                    Ok(key) => (key, Waiting::New(job, Some(key))),
                    Err(error) => return fail(&job.events, error),
                }
            }
            Waiting::New(job, Some(key)) => (key, Waiting::New(job, Some(key))),
            Waiting::Again(active) => (active.key, Waiting::Again(active)),
        };
        match self.executor.command(&Command::Ask { key }) {
            Ok(_) => self.coming.push((key, waiting)),
            Err(error) => self.drop_waiting(vec![waiting], &error),
        }
    }

    /// Sessions that have come.
    fn there(&mut self) -> Vec<u64> {
        match self.executor.command(&Command::Turns {}) {
            Ok(keys) => keys.as_array().into_iter().flatten().filter_map(Value::as_u64).collect(),
            Err(error) => {
                // Each one's own step says why.
                eprintln!("overspill: nobody is brought ahead: {error}");
                self.coming.iter().map(|(key, _)| *key).collect()
            }
        }
    }

    /// A session that makes no more steps for now.
    pub(crate) fn unseat(&mut self, key: u64) {
        if let Err(error) = self.executor.command(&Command::EndTurn { key }) {
            eprintln!("overspill: session {key} keeps its place: {error}");
        }
    }

    /// Starts a request whose session is there.
    fn start(&mut self, job: Job, key: u64) {
        let Job { owner, work, events, ticket, .. } = job;
        let began = match work {
            Work::Begin(generate) => self.begin(key, generate),
            Work::Resume { .. } => self.take_up(key),
        };
        let (progress, stands) = match began {
            Ok(began) => began,
            Err(error) => {
                self.refuse(Some(key));
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

    fn begin(&mut self, key: u64, generate: Generate) -> Result<Began> {
        let Generate { prompt, params, .. } = generate;
        let began = self.executor.command(&Command::Begin {
            key,
            prompt: &prompt,
            max_tokens: params.max_tokens,
            open_ended: params.open_ended,
            temperature: params.temperature,
            top_p: params.top_p,
            seed: params.seed,
            logprobs: params.logprobs,
        })?;
        let count = |name: &str| began.get(name).and_then(Value::as_u64).unwrap_or(0);
        let prompt_tokens = (count("prompt_tokens"), count("cached_tokens"));
        self.metrics.prompt(prompt_tokens.0 - prompt_tokens.1.min(prompt_tokens.0));
        Ok((Progress::new(params, prompt_tokens, count("max_tokens") as usize), None))
    }

    fn take_up(&mut self, key: u64) -> Result<Began> {
        let rest = self.table.get_mut(key).and_then(|entry| entry.rest.take());
        let rest = rest.ok_or_else(|| Error::NoSession { id: String::new() })?;
        Ok((rest.progress, Some(rest.layer)))
    }

    /// A request of a session is not done: it is as it was.
    fn refuse(&mut self, key: Option<u64>) {
        let Some(key) = key else { return };
        self.unseat(key);
        if let Some(entry) = self.table.get_mut(key) {
            entry.rest();
        }
        self.close_nameless(key);
    }

    // ---- endings -------------------------------------------------------------------------------

    /// Gives up requests that wait and whose client is gone, or that have waited too long.
    pub(crate) fn sweep(&mut self) {
        if self.swept.elapsed() < SWEEP {
            return;
        }
        self.swept = Instant::now();
        let limit_s = self.limits.queue_s;
        let gone = self.take_waiting(|waiting| match waiting {
            Waiting::New(job, _) => job.events.is_closed() || job.since.elapsed().as_secs_f64() > limit_s,
            Waiting::Again(active) => active.events.is_closed(),
        });
        self.drop_waiting(gone, &Error::QueueTimeout { limit_s });
    }

    /// Stops whatever a session is doing, so that it can be closed.
    pub(crate) fn cancel(&mut self, key: u64) {
        let error = Error::Conflict { message: "the session was deleted".to_owned() };
        let waiting = self.take_waiting(|waiting| match waiting {
            Waiting::New(_, found) => *found == Some(key),
            Waiting::Again(active) => active.key == key,
        });
        self.drop_waiting(waiting, &error);
        for active in std::mem::take(&mut self.running) {
            if active.key == key { self.failed(active, error.clone()) } else { self.running.push(active) }
        }
    }

    /// Those for which `goes` is true, whether they wait for a seat or for their session.
    fn take_waiting(&mut self, mut goes: impl FnMut(&Waiting) -> bool) -> Vec<Waiting> {
        let mut taken = self.queue.take(&mut goes);
        for (key, waiting) in std::mem::take(&mut self.coming) {
            if goes(&waiting) { taken.push(waiting) } else { self.coming.push((key, waiting)) }
        }
        taken
    }

    fn drop_waiting(&mut self, gone: Vec<Waiting>, error: &Error) {
        for waiting in gone {
            match waiting {
                Waiting::New(job, key) => {
                    self.refuse(key);
                    fail(&job.events, error.clone());
                }
                Waiting::Again(active) => self.failed(active, error.clone()),
            }
        }
    }

    /// Begins to end: what has a session is left where it stands, what has none may go on for a while.
    pub(crate) fn end(&mut self) {
        self.ending.get_or_insert_with(Instant::now);
        let waiting = self.take_waiting(|_| true);
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
    pub(crate) fn give_up(&mut self) {
        for active in std::mem::take(&mut self.running) {
            self.failed(active, Error::ShuttingDown);
        }
        let waiting = self.take_waiting(|_| true);
        self.drop_waiting(waiting, &Error::ShuttingDown);
    }
}

#[cfg(test)]
mod tests;
