//! The scheduler against other rules, on a machine that is described by what was measured of one.
//!
//! Every rule runs in the same scheduler over the same executor: admission, deadlines, write-through and
//! the order in which host memory is given up are the same for all; what differs is who leaves, when,
//! how, and whether anybody comes back ahead of time. Times are simulated, nothing is moved. What is not
//! modelled: that a session may start before the last of its layers is there, and that copies one way
//! slow those the other way down (by a tenth, measured).

mod trace;
mod world;

use serde::{Deserialize, Serialize};
pub use trace::{Arrival, Kind, Limits, Recipe, Turn, fingerprint};

use crate::scheduler::{Costs, Policy, SchedulerConfig};

/// What is simulated: measured speeds, and how much there is of what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setup {
    /// Where the figures are from.
    pub about: String,
    /// Bytes of a token's keys and values, all layers.
    pub token_bytes: u64,
    /// Tokens of a slab.
    pub slab_tokens: u64,
    /// Slabs.
    pub slabs: usize,
    /// Sessions of a batch.
    pub seats: usize,
    /// Host memory for copies, in GB.
    pub host_gb: f64,
    /// Disk for copies, in GB.
    pub disk_gb: f64,
    /// A session's copy out.
    pub out_gbps: f64,
    /// A session's copy in.
    pub in_gbps: f64,
    /// Disk, writing; 0: no disk.
    pub write_gbps: f64,
    /// Disk, reading.
    pub read_gbps: f64,
    /// A prefill of a whole slab.
    pub prefill_ms: f64,
    /// A step of one session whose slab is full.
    pub step_ms: f64,
    /// What each further full slab adds to a step.
    pub step_more_ms: f64,
    /// By when after it is ready a session should have its next token.
    pub deadline_ms: f64,
}

/// The machine as the simulation uses it.
#[derive(Debug, Clone)]
struct Machine {
    token_bytes: u64,
    host_bytes: u64,
    host_spare_bytes: u64,
    costs: Costs,
    prefill_us_per_token: f64,
    step_us: f64,
    step_us_per_token: f64,
}

impl Machine {
    /// Never faster than a step: it reads the weights once.
    fn prefill_us(&self, tokens: u64) -> u64 {
        (tokens as f64 * self.prefill_us_per_token).max(self.step_us).ceil() as u64
    }

    fn step_us(&self, tokens: u64) -> u64 {
        (self.step_us + tokens as f64 * self.step_us_per_token).ceil() as u64
    }
}

impl Setup {
    /// What makes no sense in it, if anything.
    ///
    /// # Errors
    /// In words.
    pub fn check(&self) -> Result<(), String> {
        let sizes = [
            ("host_gb", self.host_gb),
            ("out_gbps", self.out_gbps),
            ("in_gbps", self.in_gbps),
            ("read_gbps", self.read_gbps),
            ("prefill_ms", self.prefill_ms),
            ("step_ms", self.step_ms),
            ("deadline_ms", self.deadline_ms),
        ];
        if let Some((name, value)) = sizes.iter().find(|(_, value)| !(*value > 0.0 && *value < 1e9)) {
            return Err(format!("{name} of the machine has to be a positive number, not {value}"));
        }
        let whole = [self.token_bytes, self.slab_tokens, self.slabs as u64, self.seats as u64];
        if whole.iter().any(|&count| count == 0 || count > 1 << 32) {
            return Err(
                "token_bytes, slab_tokens, slabs and seats of the machine have to be 1 or more".into()
            );
        }
        let slab_gb = (self.slab_tokens * self.token_bytes) as f64 / 1e9;
        if self.host_gb < 4.0 * slab_gb {
            return Err(format!("host_gb holds less than four sessions of {slab_gb:.3} GB"));
        }
        let rest = [self.disk_gb, self.write_gbps, self.step_more_ms, self.step_ms - self.step_more_ms];
        if rest.iter().any(|&value| !(0.0..1e9).contains(&value)) {
            return Err("disk_gb, write_gbps and step_more_ms of the machine must not be negative".into());
        }
        Ok(())
    }

    fn machine(&self) -> Machine {
        let slab_bytes = self.slab_tokens * self.token_bytes;
        let us_per_byte = |gbps: f64| 1e-3 / gbps;
        let step_us_per_token = 1e3 * self.step_more_ms / self.slab_tokens as f64;
        let prefill_us_per_token = 1e3 * self.prefill_ms / self.slab_tokens as f64;
        Machine {
            token_bytes: self.token_bytes,
            host_bytes: (self.host_gb * 1e9) as u64,
            host_spare_bytes: 2 * slab_bytes,
            costs: Costs {
                out_us_per_byte: us_per_byte(self.out_gbps),
                in_us_per_byte: us_per_byte(self.in_gbps),
                write_us_per_byte: (self.write_gbps > 0.0).then(|| us_per_byte(self.write_gbps)),
                read_us_per_byte: us_per_byte(self.read_gbps),
                recompute_us_per_token: Some(prefill_us_per_token),
            },
            prefill_us_per_token,
            step_us: 1e3 * (self.step_ms - self.step_more_ms),
            step_us_per_token,
        }
    }

    /// Sessions that all tiers hold together, should each grow to a slab.
    fn live_sessions(&self) -> usize {
        let slab_gb = (self.slab_tokens * self.token_bytes) as f64 / 1e9;
        self.slabs + ((self.host_gb + self.disk_gb) / slab_gb) as usize
    }

    fn scheduler(&self, rule: &Rule) -> SchedulerConfig {
        let mut costs = self.machine().costs;
        if !rule.may_discard {
            costs.recompute_us_per_token = None;
        }
        SchedulerConfig {
            slabs: self.slabs,
            live_sessions: self.live_sessions(),
            seats: self.seats,
            spare_slabs: 2,
            arrivals: 2,
            reads: 1,
            patience_us: (1e3 * self.deadline_ms) as u64,
            retry_us: 50_000,
            clean_below_bytes: 8 * self.token_bytes,
            costs,
            policy: rule.policy,
        }
    }
}

/// A set of rules by name.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// What it is called.
    pub name: &'static str,
    /// What it does.
    pub policy: Policy,
    /// Whether sessions may be thrown away and computed again, which gives other bits.
    pub may_discard: bool,
    /// Whether sessions say truly how long they will wait, each time.
    pub tells_truth: bool,
    /// Whether it is one of those that ours is compared with.
    pub is_static: bool,
}

const STATIC: Rule =
    Rule { name: "", policy: Policy::LRU, may_discard: false, tells_truth: false, is_static: true };

/// Ours, ours with recomputing, the static ones, and ours as if it knew every wait.
pub const RULES: [Rule; 8] = [
    Rule { name: "djinn", policy: Policy::DJINN, is_static: false, ..STATIC },
    Rule { name: "djinn-discard", policy: Policy::DJINN, may_discard: true, is_static: false, ..STATIC },
    Rule { name: "lru", ..STATIC },
    Rule { name: "fifo", policy: Policy::FIFO, ..STATIC },
    Rule { name: "always-swap", policy: Policy::ALWAYS_SWAP, ..STATIC },
    Rule { name: "never-swap", policy: Policy::NEVER_SWAP, ..STATIC },
    Rule { name: "recompute", policy: Policy::RECOMPUTE, may_discard: true, ..STATIC },
    Rule { name: "clairvoyant", policy: Policy::DJINN, tells_truth: true, is_static: false, ..STATIC },
];

/// What came of a simulation, as it was counted.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// When the last token was there.
    pub end_us: u64,
    /// Turns, and of these, those whose session was on the device already.
    pub turns: u64,
    /// See `turns`.
    pub turns_on_device: u64,
    /// Tokens generated.
    pub tokens: u64,
    /// From ready to the first new token, of every turn.
    pub first_us: Vec<u64>,
    /// Sessions that did not come to their end.
    pub lost_sessions: u64,
    /// Sessions that came back with bytes.
    pub restores: u64,
    /// Bytes to the device.
    pub in_bytes: u64,
    /// Bytes from the device.
    pub out_bytes: u64,
    /// Bytes to disk.
    pub written_bytes: u64,
    /// Bytes from disk.
    pub read_bytes: u64,
    /// Tokens computed again.
    pub rebuilt_tokens: u64,
    /// Time in which compute had something to do.
    pub busy_us: u64,
    /// How long each call of the scheduler took on the machine that simulated.
    pub decision_ns: Vec<u32>,
}

impl Outcome {
    /// The time that this share of the turns took at most, from ready to the first new token.
    #[must_use]
    pub fn first_ms(&mut self, share: f64) -> f64 {
        quantile(&mut self.first_us, share).map_or(f64::NAN, |us| us as f64 / 1e3)
    }

    /// How long this share of the scheduler's calls took at most.
    #[must_use]
    pub fn decision_us(&mut self, share: f64) -> f64 {
        quantile(&mut self.decision_ns, share).map_or(f64::NAN, |ns| f64::from(ns) / 1e3)
    }

    /// Turns whose first new token came later than this after they were ready.
    #[must_use]
    pub fn missed(&self, deadline_ms: f64) -> u64 {
        self.first_us.iter().filter(|&&us| us as f64 > 1e3 * deadline_ms).count() as u64
    }

    /// Tokens a second, from the first arrival to the last token.
    #[must_use]
    pub fn tokens_per_s(&self) -> f64 {
        self.tokens as f64 / (self.end_us as f64 / 1e6)
    }
}

fn quantile<T: Ord + Copy>(values: &mut [T], share: f64) -> Option<T> {
    let last = values.len().checked_sub(1)?;
    let place = (share * last as f64).round() as usize;
    Some(*values.select_nth_unstable(place).1)
}

/// Runs a trace under a rule, with arrivals `speed` times as fast as they are written down; waits stay
/// as long as they are.
///
/// # Errors
/// What the scheduler refuses: a mistake of the simulation.
pub fn simulate(setup: &Setup, trace: &[Arrival], rule: &Rule, speed: f64) -> crate::Result<Outcome> {
    run(setup, trace, rule, speed, u64::MAX)
}

/// How fast arrivals may come, as a multiple of how they are written down, with 99 of 100 turns in time:
/// to a hundredth; 0 if not even at a twentieth of it.
///
/// # Errors
/// As [`simulate`].
pub fn capacity(setup: &Setup, trace: &[Arrival], rule: &Rule) -> crate::Result<f64> {
    let turns = trace.iter().map(|arrival| arrival.turns.len() as u64).sum::<u64>();
    let is_in_time = |speed: f64| -> crate::Result<bool> {
        let outcome = run(setup, trace, rule, speed, turns / 100)?;
        Ok(outcome.missed(setup.deadline_ms) <= turns / 100)
    };
    let (mut good, mut bad) = (0.05, 0.1);
    if !is_in_time(good)? {
        return Ok(0.0);
    }
    while is_in_time(bad)? {
        (good, bad) = (bad, 2.0 * bad);
    }
    while bad / good > 1.005 {
        let middle = (good * bad).sqrt();
        if is_in_time(middle)? { good = middle } else { bad = middle }
    }
    Ok(good)
}

/// As [`simulate`], and no longer than until more than `most_missed` turns were late.
fn run(
    setup: &Setup,
    trace: &[Arrival],
    rule: &Rule,
    speed: f64,
    most_missed: u64,
) -> crate::Result<Outcome> {
    let at_us = |arrival: &Arrival| (arrival.at_us as f64 / speed) as u64;
    let faster: Vec<Arrival> =
        trace.iter().map(|arrival| Arrival { at_us: at_us(arrival), turns: arrival.turns.clone() }).collect();
    let machine = setup.machine();
    let world = world::World::new(&machine, &faster, setup.scheduler(rule), rule.tells_truth);
    world.run((1e3 * setup.deadline_ms) as u64, most_missed)
}
