//! The border to whoever runs the model.
//!
//! Commands and answers are plain data, so that an executor in another language is a function from
//! JSON to JSON. Every call comes from one thread, in order. A call that fails leaves the session as
//! it was.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, Result, request::Prompt};

/// What there is to serve.
#[derive(Debug, Clone, Deserialize)]
pub struct ModelInfo {
    /// The name under which it is served.
    pub id: String,
    /// Decoder layers.
    pub layers: usize,
    /// Width of a hidden state.
    pub hidden_size: usize,
    /// Tokens that the longest session may have.
    pub session_tokens: usize,
    /// Sessions that the device holds.
    pub slabs: usize,
    /// Where it runs.
    pub device: String,
}

/// What an executor does between steps. `key` is the session's number.
#[derive(Debug, Serialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Command<'a> {
    /// A new, empty session; `exact`: its steps are never batched with others'.
    Open {
        /// The session.
        key: u64,
        /// See above.
        exact: bool,
    },
    /// Ends a session.
    Close {
        /// The session.
        key: u64,
    },
    /// A second session that goes on from here.
    Fork {
        /// The session.
        key: u64,
        /// The second one.
        child: u64,
    },
    /// What the next steps of the session run and sample. Answers
    /// `{"prompt_tokens", "cached_tokens", "max_tokens"}`.
    Begin {
        /// The session.
        key: u64,
        /// What comes after all that the session has seen.
        prompt: &'a Prompt,
        /// Tokens to generate at most.
        max_tokens: usize,
        /// Whether fewer will do where there is no room for as many.
        open_ended: bool,
        /// 0: the likeliest token.
        temperature: f64,
        /// Share of the probability that is sampled from.
        top_p: f64,
        /// Of the session's own random numbers.
        seed: u64,
        /// How many alternatives are reported for each token; none: no probabilities at all.
        logprobs: Option<u8>,
    },
    /// The session is to make steps: it is brought to the device while others make theirs.
    Ask {
        /// The session.
        key: u64,
    },
    /// Answers the list of those that asked and are there since the last time. Where one cannot be brought it is
    /// among them: its step says why.
    Turns {},
    /// The session makes no steps for now: others may take its place on the device.
    EndTurn {
        /// The session.
        key: u64,
    },
    /// The generation is over, or given up.
    Finish {
        /// The session.
        key: u64,
    },
    /// Steers a layer by a vector, or by the difference between two texts; strength 0 ends it.
    Steer {
        /// The session.
        key: u64,
        /// The layer.
        layer: usize,
        /// What it is called.
        name: &'a str,
        /// The direction, or
        vector: Option<&'a [f32]>,
        /// the text whose hidden state it leads to,
        toward: Option<&'a str>,
        /// and the one from which it leads away.
        away: Option<&'a str>,
        /// What the direction is multiplied with.
        strength: f64,
    },
    /// The session waits for something outside for about `eta_ms`.
    IoWait {
        /// The session.
        key: u64,
        /// Milliseconds from now.
        eta_ms: f64,
    },
    /// Writes a session to a file. Answers a record that `Load` needs beside it.
    Save {
        /// The session.
        key: u64,
        /// The file.
        path: &'a Path,
    },
    /// Reads what `Save` wrote.
    Load {
        /// The session.
        key: u64,
        /// The file.
        path: &'a Path,
        /// What `Save` answered.
        record: &'a Value,
    },
    /// Where everything is. Answers `{"sessions": {KEY: {...}}, "pool": {...}}`.
    Report {},
}

/// Why an executor did not do something, as plain data.
#[derive(Debug, Deserialize)]
pub struct Problem {
    /// `invalid`, `too_long`, `conflict`, `no_room`, or anything else.
    pub kind: String,
    /// For people.
    pub message: String,
    /// Tokens there would be, where it is too long.
    #[serde(default)]
    pub tokens: u64,
    /// The most there may be.
    #[serde(default)]
    pub limit_tokens: u64,
}

impl From<Problem> for Error {
    fn from(problem: Problem) -> Self {
        let Problem { kind, message, tokens, limit_tokens } = problem;
        match kind.as_str() {
            "invalid" => Self::Invalid { message, param: None },
            "too_long" => Self::TooLong { tokens, limit_tokens },
            "conflict" => Self::Conflict { message },
            "no_room" => Self::NoRoom { message },
            _ => Self::Internal { message },
        }
    }
}

/// The next forward of a session: its key, and the layer after which to stop.
pub type Step = (u64, Option<usize>);

/// A token that was generated.
#[derive(Debug, Clone, Deserialize)]
pub struct Token {
    /// The text that became certain with it, which may be empty.
    pub text: String,
    /// What the token is, and how likely it and its alternatives were, where that was asked for.
    pub logprob: Option<Logprob>,
    /// Whether it is an end of sequence, which is no text.
    pub end: bool,
}

/// How likely a token was.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Logprob {
    /// Its text.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f64,
    /// The likeliest tokens with theirs.
    pub top: Vec<(String, f64)>,
}

/// What a step of one session ended in.
#[derive(Debug)]
pub enum StepOutcome {
    /// A token.
    Token(Token),
    /// Stopped after this layer.
    Paused(usize),
    /// It failed; the session is as before the step.
    Failed(Error),
}

/// Runs the model; see the module.
pub trait Executor {
    /// Does what `command` says.
    fn command(&mut self, command: &Command<'_>) -> Result<Value>;
    /// One forward of each session.
    fn step(&mut self, steps: &[Step]) -> Result<Vec<StepOutcome>>;
    /// The hidden state of a paused session, as a safetensors file.
    fn hidden(&mut self, key: u64) -> Result<Vec<u8>>;
    /// Replaces it.
    fn set_hidden(&mut self, key: u64, file: &[u8]) -> Result<()>;
}
