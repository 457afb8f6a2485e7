//! What a server is told at its start.

use std::{net::SocketAddr, path::PathBuf};

use serde::Deserialize;

/// How a server behaves.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    /// Where it listens.
    pub bind: SocketAddr,
    /// API keys; none: everybody who reaches the address is one owner, which only loopback allows.
    pub keys: Vec<String>,
    /// Where sessions are saved; none: they end with the process.
    pub state_dir: Option<PathBuf>,
    /// See [`Limits`].
    #[serde(default)]
    pub limits: Limits,
}

/// What nobody may exceed.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Bytes of a hidden state that is put.
    pub hidden_bytes: usize,
    /// Tokens that one request may generate.
    pub max_tokens: usize,
    /// Open sessions of one key.
    pub sessions_per_key: usize,
    /// Open sessions in all.
    pub sessions: usize,
    /// Requests of one key that generate or wait to.
    pub queue_per_key: usize,
    /// Requests that generate or wait to, in all.
    pub queue: usize,
    /// Sequences of one step; beyond that, and beyond the slabs of the device, requests take turns.
    pub batch: usize,
    /// Tokens after which a request lets others have a turn, if they wait.
    pub turn_tokens: usize,
    /// Open connections.
    pub connections: usize,
    /// Seconds that a connection may take to send a request's head.
    pub header_s: f64,
    /// Seconds that a connection may take to send a request's body.
    pub body_s: f64,
    /// Seconds that a request may wait for its first turn.
    pub queue_s: f64,
    /// Seconds that generations without a session may go on after the server is asked to end.
    pub grace_s: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 1 << 20,
            hidden_bytes: 256 << 20,
            max_tokens: 4096,
            sessions_per_key: 4096,
            sessions: 16_384,
            queue_per_key: 1024,
            queue: 2048,
            batch: 32,
            turn_tokens: 64,
            connections: 4096,
            header_s: 10.0,
            body_s: 30.0,
            queue_s: 600.0,
            grace_s: 10.0,
        }
    }
}
