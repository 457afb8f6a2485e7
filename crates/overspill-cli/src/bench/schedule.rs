//! From an experiment to what is done, turn by turn: who starts, who decodes, who leaves and who comes back.
//!
//! The schedule is a pure function of the file, so the run under the cap and its oracle do the same forwards with the
//! same rows. Who leaves is known before the run as well: of those on the device, the one whose next turn is
//! farthest; who is next is brought back while the others decode. (How a pool decides when it is not told is another
//! question than the one asked here: what swapping costs.)

use std::collections::{BTreeSet, VecDeque};

use serde::Serialize;

use super::config::{Agents, Config};
use crate::{Failure, table};

/// One turn.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Turn {
    /// Sessions off the device before it.
    pub leave: Vec<u32>,
    /// Sessions that begin: their prompts are run, one by one.
    pub start: Vec<u32>,
    /// Sessions that decode together.
    pub rows: Vec<u32>,
    /// Tokens that each of them then has, if no breakpoint comes before.
    pub to: Vec<u32>,
    /// Sessions that are brought back meanwhile, for the next turn.
    pub prefetch: Vec<u32>,
}

/// What follows from an experiment's file.
#[derive(Debug, Serialize)]
pub struct Plan {
    pub weight_bytes: u64,
    /// Keys and values of one token.
    pub token_bytes: u64,
    /// Keys and values of a prompt.
    pub session_bytes: u64,
    pub slab_bytes: u64,
    pub slabs: u64,
    pub arena_bytes: u64,
    pub workspace_bytes: u64,
    pub cap_bytes: u64,
    /// What the timeline may show: the cap; on a CPU, where host copies are this process's too, with those.
    pub limit_bytes: u64,
    pub host_bytes: u64,
    pub disk_bytes: u64,
    /// Weights and all prompts.
    pub demand_bytes: u64,
    pub slab_tokens: u32,
    pub turns: Vec<Turn>,
    pub expected: Expected,
}

/// What the arithmetic says of times.
#[derive(Debug, Serialize)]
pub struct Expected {
    /// A prompt's keys and values over the link.
    pub swap_ms: f64,
    /// Sessions that come back in all.
    pub restores: u64,
    /// Tokens a turn from which on the next group comes back while this one decodes.
    pub tokens_that_hide: f64,
    /// All turns, swaps hidden behind compute where they can be.
    pub total_s: f64,
    /// The same without swaps.
    pub compute_s: f64,
}

fn bytes(gb: f64) -> u64 {
    (gb * 1e9).round() as u64
}

/// The plan of an experiment.
///
/// # Errors
/// [`Failure::Misuse`] where sessions would fit under the cap, or a group of them does not fit on the device.
pub fn plan(config: &Config) -> Result<Plan, Failure> {
    let (weight_bytes, token_bytes) = (config.weight_bytes()?, config.token_bytes()?);
    let session_bytes = token_bytes * u64::from(config.prompt_tokens);
    let demand_bytes = weight_bytes + session_bytes * u64::from(config.sessions);
    let (cap_bytes, workspace_bytes) = (bytes(config.cap_gb), bytes(config.workspace_gb));
    if demand_bytes <= cap_bytes {
        return Err(Failure::Misuse(format!(
            "no oversubscription: {} sessions and the weights take {:.3} GB, the cap is {:.3} GB",
            config.sessions,
            demand_bytes as f64 / 1e9,
            config.cap_gb
        )));
    }
    let slab_tokens = config.slab_tokens();
    let runs = 2 * u64::from(config.model.layers);
    // As `overspill_djinn::Geometry` has it: runs start on 512 bytes.
    let slab_bytes = runs * (token_bytes / runs * u64::from(slab_tokens)).next_multiple_of(512);
    let slabs = cap_bytes.saturating_sub(weight_bytes + workspace_bytes) / slab_bytes;
    if slabs < u64::from(config.rows.min(config.sessions)) {
        return Err(Failure::Misuse(format!(
            "{} sessions decode together and {slabs} fit: {:.3} GB cap, {:.3} weights, {:.3} workspace, {:.3} a session",
            config.rows,
            config.cap_gb,
            weight_bytes as f64 / 1e9,
            config.workspace_gb,
            slab_bytes as f64 / 1e9
        )));
    }
    let mut turns = match &config.agents {
        None => ring(config),
        Some(agents) => arrivals(config, agents),
    };
    let restores = place(&mut turns, slabs as usize);
    let on_cpu = if config.device == "cpu" { bytes(config.host_gb) } else { 0 };
    let expected = expect(config, &turns, session_bytes, restores);
    Ok(Plan {
        weight_bytes,
        token_bytes,
        session_bytes,
        slab_bytes,
        slabs,
        arena_bytes: slabs * slab_bytes,
        workspace_bytes,
        cap_bytes,
        limit_bytes: cap_bytes + on_cpu,
        host_bytes: bytes(config.host_gb),
        disk_bytes: bytes(config.disk_gb),
        demand_bytes,
        slab_tokens,
        turns,
        expected,
    })
}

/// Groups of equal size take turns in a ring: all start, then all decode, until all are done.
fn ring(config: &Config) -> Vec<Turn> {
    let count = config.sessions.div_ceil(config.rows);
    let bounds: Vec<u32> = (0..=count).map(|i| i * config.sessions / count).collect();
    let groups: Vec<Vec<u32>> = bounds.windows(2).map(|ends| (ends[0]..ends[1]).collect()).collect();
    let mut stops: Vec<u32> = config.breaks.iter().map(|one| one.step).collect();
    stops.sort_unstable();
    // A pause in the prompt is one more turn that ends where the forward over the prompt does.
    let mut ends = Vec::new();
    let (mut tokens, mut stops) = (u32::from(stops.first() != Some(&0)), VecDeque::from(stops));
    let mut first = true;
    while tokens < config.new_tokens {
        let end = config.new_tokens.min(tokens + config.tokens_per_turn);
        let to = match stops.front() {
            Some(&step) if step < end => step + 1,
            // The first turn is short, so that every session has its prompt before any goes on.
            _ if first => tokens + 1,
            _ => end,
        };
        // Paused in step `s` it has `s` tokens.
        tokens = if stops.front().is_some_and(|&step| step + 1 == to) {
            stops.pop_front().map_or(to, |s| s)
        } else {
            to
        };
        ends.push(to);
        first = false;
    }
    let turn = |(index, to): (usize, &u32), group: &Vec<u32>| Turn {
        start: if index == 0 { group.clone() } else { Vec::new() },
        rows: group.clone(),
        to: vec![*to; group.len()],
        ..Turn::default()
    };
    ends.iter().enumerate().flat_map(|end| groups.iter().map(move |group| turn(end, group))).collect()
}

/// Sessions arrive, take turns of `tokens_per_turn` in the order in which they are ready, and wait for tools between.
fn arrivals(config: &Config, agents: &Agents) -> Vec<Turn> {
    let mut random = fastrand::Rng::with_seed(config.seed);
    let mut after = |mean: f64| -mean * (1.0 - random.f64()).ln();
    let mut waiting: Vec<(f64, u32)> = Vec::new();
    let mut arrived = 0.0;
    for id in 0..config.sessions {
        waiting.push((arrived, id));
        arrived += after(agents.arrival_steps);
    }
    let mut tokens = vec![0u32; config.sessions as usize];
    let (mut turns, mut ready, mut clock) = (Vec::new(), VecDeque::new(), 0.0f64);
    loop {
        waiting.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let due = waiting.partition_point(|(when, _)| *when <= clock);
        ready.extend(waiting.drain(..due).map(|(_, id)| id));
        if ready.is_empty() {
            let Some(&(when, _)) = waiting.first() else { return turns };
            clock = when;
            continue;
        }
        let rows: Vec<u32> = ready.drain(..ready.len().min(config.rows as usize)).collect();
        let mut turn = Turn { rows: rows.clone(), ..Turn::default() };
        for &id in &rows {
            let had = &mut tokens[id as usize];
            if *had == 0 {
                turn.start.push(id);
                *had = 1;
            }
            *had = config.new_tokens.min(*had + config.tokens_per_turn);
            turn.to.push(*had);
        }
        turns.push(turn);
        clock += f64::from(config.tokens_per_turn);
        let again = rows.into_iter().filter(|&id| tokens[id as usize] < config.new_tokens);
        waiting.extend(again.map(|id| (clock + after(agents.tool_steps), id)));
    }
}

/// Says who leaves and who comes back ahead of time; how many come back in all.
fn place(turns: &mut [Turn], slabs: usize) -> u64 {
    let rows: Vec<Vec<u32>> = turns.iter().map(|turn| turn.rows.clone()).collect();
    let next_use = |id: u32, from: usize| {
        rows[from..].iter().position(|rows| rows.contains(&id)).map_or(usize::MAX, |i| from + i)
    };
    let mut resident: BTreeSet<u32> = BTreeSet::new();
    let mut restores = 0;
    for index in 0..turns.len() {
        let mut needed: BTreeSet<u32> = rows[index].iter().copied().collect();
        let starting: BTreeSet<u32> = turns[index].start.iter().copied().collect();
        restores +=
            needed.iter().filter(|id| !resident.contains(id) && !starting.contains(id)).count() as u64;
        let next = turns.get(index + 1).map_or(Vec::new(), |turn| {
            turn.rows.iter().copied().filter(|id| !turn.start.contains(id)).collect::<Vec<_>>()
        });
        for id in next {
            let fits = needed.len() < slabs;
            if fits && needed.insert(id) && !resident.contains(&id) {
                turns[index].prefetch.push(id);
                restores += 1;
            }
        }
        let mut spare: Vec<u32> = resident.difference(&needed).copied().collect();
        // Who leaves first stands last.
        spare.sort_by_key(|&id| next_use(id, index + 1));
        while resident.union(&needed).count() > slabs {
            let Some(id) = spare.pop() else { break };
            resident.remove(&id);
            turns[index].leave.push(id);
        }
        resident.extend(needed);
    }
    restores
}

fn expect(config: &Config, turns: &[Turn], session_bytes: u64, restores: u64) -> Expected {
    let swap_ms = session_bytes as f64 / config.expect.link_gbps / 1e6;
    let (mut total_ms, mut compute_ms) = (0.0, 0.0);
    let mut tokens = vec![0u32; config.sessions as usize];
    for turn in turns {
        for &id in &turn.start {
            tokens[id as usize] = 1;
        }
        let steps =
            turn.rows.iter().zip(&turn.to).map(|(&id, &to)| to - tokens[id as usize]).max().unwrap_or(0);
        for (&id, &to) in turn.rows.iter().zip(&turn.to) {
            tokens[id as usize] = to;
        }
        let compute =
            f64::from(steps) * config.expect.step_ms + turn.start.len() as f64 * config.expect.prefill_ms;
        compute_ms += compute;
        total_ms += compute.max(turn.prefetch.len() as f64 * swap_ms);
    }
    Expected {
        swap_ms,
        restores,
        tokens_that_hide: f64::from(config.rows.min(config.sessions)) * swap_ms / config.expect.step_ms,
        total_s: total_ms / 1e3,
        compute_s: compute_ms / 1e3,
    }
}

impl Plan {
    /// The arithmetic, for people.
    pub fn to_text(&self, config: &Config) -> String {
        let gb = |bytes: u64| format!("{:.3} GB", bytes as f64 / 1e9);
        let sessions = u64::from(config.sessions);
        let row = |name: String, value: String| vec![name, value];
        let rows = [
            row("weights".to_owned(), gb(self.weight_bytes)),
            row(
                format!(
                    "{sessions} sessions of {} tokens, {} B a token",
                    config.prompt_tokens, self.token_bytes
                ),
                gb(sessions * self.session_bytes),
            ),
            row(
                format!("demand, {:.2} of the cap", self.demand_bytes as f64 / self.cap_bytes as f64),
                gb(self.demand_bytes),
            ),
            row("cap".to_owned(), gb(self.cap_bytes)),
            row(
                format!("room for {} sessions of up to {} tokens", self.slabs, self.slab_tokens),
                gb(self.arena_bytes),
            ),
            row(
                format!("swap of {} at {} GB/s", gb(self.session_bytes), config.expect.link_gbps),
                format!("{:.1} ms", self.expected.swap_ms),
            ),
            row(
                format!("tokens a turn that hide the next group's swap, {} rows", config.rows),
                format!("{:.0}, stated {}", self.expected.tokens_that_hide.ceil(), config.tokens_per_turn),
            ),
            row(
                format!("{} turns, {} restores, expected", self.turns.len(), self.expected.restores),
                format!("{:.1} s, {:.1} without swaps", self.expected.total_s, self.expected.compute_s),
            ),
        ];
        format!("{} on {}\n{}", config.name, config.device, table::columns(&rows))
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
