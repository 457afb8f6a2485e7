//! What a simulation is fed with: sessions that arrive, take turns, and wait for tools between them.

use serde::{Deserialize, Serialize};

/// One turn of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// Tokens that it starts with: a prompt, or what a tool said.
    pub prompt_tokens: u64,
    /// Tokens that it generates.
    pub new_tokens: u64,
    /// How long the session waits afterwards.
    pub wait_us: u64,
    /// How long it says that it will wait, if it says so.
    pub eta_us: Option<u64>,
}

/// One session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// When it comes.
    pub at_us: u64,
    /// What it does. It ends with the last turn.
    pub turns: Vec<Turn>,
}

/// A kind of wait, lognormal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Wait {
    /// Of all waits, how many are of this kind; shares add up to 1.
    pub share: f64,
    /// Half of them are shorter.
    pub median_ms: f64,
    /// Deviation of the logarithm.
    pub sigma: f64,
}

/// A trace as the few numbers that it is drawn from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What it stands for.
    pub about: String,
    /// Of the generator.
    pub seed: u64,
    /// How many sessions.
    pub sessions: usize,
    /// Sessions that arrive in a second, on average (Poisson).
    pub sessions_per_s: f64,
    /// Turns of a session, on average (geometric).
    pub turns: f64,
    /// Tokens of the first prompt, on average (exponential).
    pub prompt_tokens: f64,
    /// Tokens of what a tool says, on average (exponential).
    pub tool_tokens: f64,
    /// Tokens that a turn generates, on average (geometric).
    pub new_tokens: f64,
    /// A session ends when it has this many tokens.
    pub limit_tokens: u64,
    /// How long tools take.
    pub waits: Vec<Wait>,
    /// Share of waits of which the session says how long they will be.
    pub told_share: f64,
    /// Deviation of the logarithm of what it says over what is true.
    pub told_sigma: f64,
    /// xxh3-64 of the trace: that the generator still draws what it drew.
    pub xxh3: Option<String>,
}

impl Recipe {
    /// Draws the trace.
    #[must_use]
    pub fn draw(&self) -> Vec<Arrival> {
        let mut rng = fastrand::Rng::with_seed(self.seed);
        let mut at_us = 0.0;
        let arrivals = (0..self.sessions).map(|_| {
            at_us += exponential(&mut rng, 1e6 / self.sessions_per_s);
            Arrival { at_us: at_us as u64, turns: self.turns(&mut rng) }
        });
        arrivals.collect()
    }

    fn turns(&self, rng: &mut fastrand::Rng) -> Vec<Turn> {
        let count = 1 + exponential(rng, self.turns - 1.0) as usize;
        let mut room = self.limit_tokens;
        let mut turns: Vec<Turn> = Vec::new();
        for number in 0..count {
            let mean = if number == 0 { self.prompt_tokens } else { self.tool_tokens };
            let prompt_tokens = 1 + exponential(rng, mean - 1.0) as u64;
            let new_tokens = 1 + exponential(rng, self.new_tokens - 1.0) as u64;
            if prompt_tokens + new_tokens > room {
                break;
            }
            room -= prompt_tokens + new_tokens;
            let wait_us = self.wait_us(rng);
            let error = (self.told_sigma * normal(rng)).exp();
            let is_told = rng.f64() < self.told_share;
            let eta_us = is_told.then_some((wait_us as f64 * error) as u64);
            turns.push(Turn { prompt_tokens, new_tokens, wait_us, eta_us });
        }
        turns
    }

    fn wait_us(&self, rng: &mut fastrand::Rng) -> u64 {
        let mut at = rng.f64();
        let kind = self.waits.iter().find(|wait| {
            at -= wait.share;
            at < 0.0
        });
        let kind = kind.or(self.waits.last());
        kind.map_or(0, |wait| (1e3 * wait.median_ms * (wait.sigma * normal(rng)).exp()) as u64)
    }
}

fn exponential(rng: &mut fastrand::Rng, mean: f64) -> f64 {
    -mean * (1.0 - rng.f64()).ln()
}

/// Box and Muller's.
fn normal(rng: &mut fastrand::Rng) -> f64 {
    (-2.0 * (1.0 - rng.f64()).ln()).sqrt() * (std::f64::consts::TAU * rng.f64()).cos()
}

/// xxh3-64 of a trace, as recipes state it.
#[must_use]
pub fn fingerprint(trace: &[Arrival]) -> String {
    let mut bytes = Vec::new();
    for arrival in trace {
        bytes.extend(arrival.at_us.to_le_bytes());
        for turn in &arrival.turns {
            let eta_us = turn.eta_us.unwrap_or(u64::MAX);
            for field in [turn.prompt_tokens, turn.new_tokens, turn.wait_us, eta_us] {
                bytes.extend(field.to_le_bytes());
            }
        }
    }
    format!("{:016x}", twox_hash::XxHash3_64::oneshot(&bytes))
}
