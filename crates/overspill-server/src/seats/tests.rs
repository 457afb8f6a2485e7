//! Seats against an executor that is made up.

use std::{
    collections::HashMap,
    sync::{Arc, mpsc::channel},
};

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::*;
use crate::{
    Executor, Limits, ModelInfo, Prompt, Step, StepOutcome, Token,
    gate::Gate,
    metrics::Metrics,
    progress::{Kind, Params},
    request::Delivery,
};

/// Sessions that are away come when they have been asked for so often; a step gives each a token.
#[derive(Default)]
struct Fake {
    away: HashMap<u64, usize>,
    asked: Vec<u64>,
    ended: Vec<u64>,
    steps: Vec<Vec<u64>>,
}

impl Executor for Fake {
    fn command(&mut self, command: &Command<'_>) -> Result<Value> {
        match *command {
            Command::Ask { key } => self.asked.push(key),
            Command::EndTurn { key } | Command::Finish { key } => self.ended.push(key),
            Command::Turns {} => {
                let away = &mut self.away;
                let there = self.asked.iter().filter(|key| match away.get_mut(key) {
                    Some(0) | None => true,
                    Some(left) => {
                        *left -= 1;
                        false
                    }
                });
                return Ok(there.copied().collect());
            }
            Command::Begin { .. } => return Ok(serde_json::json!({"prompt_tokens": 1, "max_tokens": 3})),
            _ => {}
        }
        Ok(Value::Null)
    }

    fn step(&mut self, steps: &[Step]) -> Result<Vec<StepOutcome>> {
        self.steps.push(steps.iter().map(|(key, _)| *key).collect());
        let token = || Token { text: "x".to_owned(), logprob: None, end: false };
        Ok(steps.iter().map(|_| StepOutcome::Token(token())).collect())
    }

    fn hidden(&mut self, _: u64) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    fn set_hidden(&mut self, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }
}

fn worker(executor: &mut Fake, slabs: usize) -> Worker<'_> {
    let info = ModelInfo {
        id: String::new(),
        layers: 1,
        hidden_size: 1,
        session_tokens: 9,
        slabs,
        device: String::new(),
    };
    let (_, inbox) = channel();
    Worker::new(executor, info, Limits::default(), Arc::new(Metrics::default()), inbox)
}

/// A request of `owner` for three tokens of session `name`, which is made if there is none.
fn ask(worker: &mut Worker<'_>, owner: &str, name: &str) -> UnboundedReceiver<Event> {
    let owner = Owner::new(owner);
    if worker.table.find(&owner, name).is_err() {
        worker.open(&owner, Some(name.to_owned()), false).unwrap();
    }
    let params = Params {
        kind: Kind::Text,
        max_tokens: 3,
        open_ended: false,
        temperature: 0.0,
        top_p: 1.0,
        seed: 0,
        stop: Vec::new(),
        logprobs: None,
        has_tools: false,
        tool_eta_ms: None,
    };
    let work = Work::Begin(Generate {
        session: Some(name.to_owned()),
        prompt: Prompt::Text(String::new()),
        params,
        delivery: Delivery { stream: false, usage: false },
        exact: false,
    });
    let (events, source) = unbounded_channel();
    let ticket = Gate::default().enter(&owner, &worker.limits).unwrap();
    worker.enqueue(Job { owner, work, events, ticket, since: Instant::now() });
    source
}

fn turn(worker: &mut Worker<'_>, times: usize) {
    for _ in 0..times {
        worker.admit();
        worker.step();
    }
}

#[test]
fn others_step_until_a_session_has_come() {
    let mut executor = Fake { away: HashMap::from([(2, 2)]), ..Fake::default() };
    let mut worker = worker(&mut executor, 2);
    let _answers = [ask(&mut worker, "a", "one"), ask(&mut worker, "a", "two")];
    turn(&mut worker, 5);
    assert_eq!(executor.steps, [vec![1], vec![1], vec![1, 2], vec![2], vec![2]]);
    assert_eq!((executor.asked, executor.ended), (vec![1, 2], vec![1, 2]));
}

#[test]
fn with_nobody_to_step_a_session_is_not_waited_for() {
    let mut executor = Fake { away: HashMap::from([(1, 99), (2, 99)]), ..Fake::default() };
    let mut worker = worker(&mut executor, 2);
    let _answers = [ask(&mut worker, "a", "one"), ask(&mut worker, "a", "two")];
    turn(&mut worker, 6);
    assert_eq!(executor.steps, [[1], [1], [1], [2], [2], [2]]);
}

#[test]
fn a_seat_counts_for_its_key_while_its_session_comes() {
    let mut executor = Fake { away: HashMap::from([(2, 99)]), ..Fake::default() };
    let mut worker = worker(&mut executor, 2);
    let _first = [ask(&mut worker, "a", "one"), ask(&mut worker, "a", "two")];
    turn(&mut worker, 1);
    let _then = [ask(&mut worker, "a", "three"), ask(&mut worker, "b", "four")];
    // When the first of a's is over, a has a seat still, and b has none.
    turn(&mut worker, 3);
    assert_eq!(executor.steps, [[1], [1], [1], [4]]);
    assert_eq!(executor.asked, [1, 2, 4]);
}

#[test]
fn who_is_gone_before_it_starts_gives_its_seat_back() {
    let mut executor = Fake { away: HashMap::from([(2, 99)]), ..Fake::default() };
    let mut worker = worker(&mut executor, 2);
    let (_first, second) = (ask(&mut worker, "a", "one"), ask(&mut worker, "a", "two"));
    turn(&mut worker, 1);
    drop(second);
    worker.swept -= 2 * SWEEP;
    worker.sweep();
    let _third = ask(&mut worker, "a", "three");
    turn(&mut worker, 1);
    assert!(worker.coming.is_empty());
    assert_eq!(worker.table.find(&Owner::new("a"), "two").unwrap().state, State::Idle);
    assert_eq!((executor.steps, executor.ended), (vec![vec![1], vec![1, 3]], vec![2]));
}
