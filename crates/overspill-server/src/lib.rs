#![forbid(unsafe_code)]
//! A server of inference sessions: OpenAI's routes, and routes for the sessions themselves.
//!
//! Sockets, keys, limits, queues and the table of sessions are here; what a model does is behind
//! [`Executor`]. Two threads: one runs every connection, and the caller's own ([`serve`]) runs the
//! [`worker`](crate) loop, which alone calls the executor and alone owns the table of sessions, so
//! neither has a lock. A request becomes a message to the worker; what it generates comes back over
//! a channel of its own, and a channel whose reader is gone ends the generation.
//!
//! Not here: tokens, sampling, tensors (the executor's), where a session's bytes are (the pool's).

mod config;
mod control;
mod error;
mod executor;
mod gate;
mod http;
mod keeping;
mod keys;
mod ledger;
mod live;
mod metrics;
mod progress;
mod queue;
mod reply;
mod request;
mod scan;
mod seats;
mod serve;
mod table;
mod tools;
mod worker;

pub use config::{Config, Limits};
pub use error::{Error, Result};
pub use executor::{Command, Executor, Logprob, ModelInfo, Problem, Step, StepOutcome, Token};
pub use request::Prompt;
pub use serve::serve;
