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

/// The most that a trace may say.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Of any time.
    pub us: u64,
    /// Of a session.
    pub tokens: u64,
}

impl Arrival {
    /// Whether it keeps to `limits`.
    #[must_use]
    pub fn check(&self, limits: &Limits) -> bool {
        let times = self.turns.iter().flat_map(|turn| [turn.wait_us, turn.eta_us.unwrap_or(0)]);
        let tokens = self.turns.iter().map(|turn| turn.prompt_tokens.saturating_add(turn.new_tokens));
        let is_empty = |turn: &Turn| turn.prompt_tokens == 0 || turn.new_tokens == 0;
        times.chain([self.at_us]).all(|us| us <= limits.us)
            && tokens.fold(0, u64::saturating_add) <= limits.tokens
            && !self.turns.iter().any(is_empty)
    }
}

/// Sessions of one kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kind {
    /// What they use.
    pub name: String,
    /// Of all sessions, how many are of this kind; shares add up to 1.
    pub share: f64,
    /// Turns, on average (1 more than a geometric number).
    pub turns: f64,
    /// Tokens of the first prompt, on average (exponential).
    pub prompt_tokens: f64,
    /// Tokens of what a tool says, on average (exponential).
    pub tool_tokens: f64,
    /// Tokens that a turn generates, on average (exponential).
    pub new_tokens: f64,
    /// Half of the waits are shorter (lognormal).
    pub wait_median_ms: f64,
    /// Deviation of the logarithm of a wait.
    pub wait_sigma: f64,
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
    /// A session ends before it would have more tokens.
    pub limit_tokens: u64,
    /// Share of waits of which the session says how long they will be.
    pub told_share: f64,
    /// Deviation of the logarithm of what it says over what is true.
    pub told_sigma: f64,
    /// What sessions there are.
    pub kinds: Vec<Kind>,
    /// xxh3-64 of the trace: that the generator still draws what it drew.
    pub xxh3: Option<String>,
}

impl Recipe {
    /// What makes no sense in it, if anything.
    ///
    /// # Errors
    /// In words.
    pub fn check(&self) -> Result<(), String> {
        let is_good = |value: f64| value.is_finite() && (0.0..1e9).contains(&value);
        let all = |kind: &Kind| {
            let tokens = [kind.prompt_tokens, kind.tool_tokens, kind.new_tokens, kind.turns];
            let rest = [kind.share, kind.wait_median_ms, kind.wait_sigma];
            tokens.iter().all(|&value| value >= 1.0 && is_good(value)) && rest.iter().all(|&v| is_good(v))
        };
        let rates = is_good(self.told_share) && is_good(self.told_sigma) && self.sessions_per_s > 1e-6;
        if self.kinds.is_empty() || !self.kinds.iter().all(all) || !rates || self.sessions > 10_000_000 {
            return Err("a number of the recipe is missing, negative, not finite or too large".into());
        }
        Ok(())
    }

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
        let mut at = rng.f64();
        let is_it = |kind: &&Kind| {
            at -= kind.share;
            at < 0.0
        };
        let Some(kind) = self.kinds.iter().find(is_it).or(self.kinds.last()) else { return Vec::new() };
        let count = 1 + exponential(rng, kind.turns - 1.0).round() as usize;
        let mut room = self.limit_tokens;
        let mut turns: Vec<Turn> = Vec::new();
        for number in 0..count {
            let mean = if number == 0 { kind.prompt_tokens } else { kind.tool_tokens };
            let prompt_tokens = 1 + exponential(rng, mean - 1.0) as u64;
            let new_tokens = 1 + exponential(rng, kind.new_tokens - 1.0) as u64;
            let wait_us = (1e3 * kind.wait_median_ms * (kind.wait_sigma * normal(rng)).exp()) as u64;
            let error = (self.told_sigma * normal(rng)).exp();
            let is_told = rng.f64() < self.told_share;
            if prompt_tokens + new_tokens > room {
                break;
            }
            room -= prompt_tokens + new_tokens;
            let eta_us = is_told.then_some((wait_us as f64 * error) as u64);
            turns.push(Turn { prompt_tokens, new_tokens, wait_us, eta_us });
        }
        turns
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
