//! The search for a plan: a few numbers varied, each choice priced by the simulator.

use std::{cmp::Reverse, collections::HashMap};

use crate::{
    Limits, Plan, Prediction, StepRecord,
    plan::{choose, settle},
    simulate,
};

/// Shares of the units that could be rebuilt, or compressed, that the first rounds of the search try.
const SHARES: usize = 8;
/// Room left for units on their way, in sizes of a large unit.
const RESERVES: [u64; 6] = [0, 1, 2, 4, 8, 16];
/// Kinds of unit whose number is varied on its own, and how often each is; fewer where a step is so long that this
/// many units would be looked at.
const LIKES: usize = 12;
const ROUNDS: usize = 4;
const MOST_LOOKS: usize = 100_000;

/// Chooses what to rebuild, what to keep, what to offload and what of that to compress, so that the simulated
/// step is the shortest within the budget.
///
/// Rebuilds are taken in the order of bytes saved a microsecond. For a number of them, what fits is
/// kept, last packed first (needed first in backward, so it occupies memory for the shortest time
/// and saves the transfer with the closest deadline), and the rest goes, compressed where that is among a
/// number of those that the codec saves most a microsecond. The two numbers and the room left for what is on
/// its way are searched, then how many of each kind of unit are rebuilt, and the simulator decides.
#[must_use]
pub fn make_plan(record: &StepRecord, limits: &Limits) -> Plan {
    let largest = record.units.iter().map(|unit| unit.bytes).max().unwrap_or(0);
    let mut search = Search::new(record, limits);
    search.attempt(search.first(0, Choice { reserve: 2 * search.large, ..Choice::default() }));
    if search.is_free() {
        return search.settled();
    }
    // A budget that nothing can keep must not drown the price: the best that can be done counts.
    let nothing = Limits { budget_bytes: 0, ..*limits };
    let floor = simulate(record, &choose(record, &nothing, &[], &[], 0), &nothing).1.peak_bytes;
    if floor > limits.budget_bytes {
        search.budget = floor + 2 * largest;
    }
    search.try_rebuilds();
    search.vary_reserve();
    if !search.coded.is_empty() && !search.is_free() {
        search.try_coded();
    }
    search.refine();
    search.vary_likes();
    search.vary_reserve();
    search.settled()
}

/// What the search varies: how many units of each kind and order, and bytes left free.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Choice {
    /// Of each kind that can be rebuilt, the last packed of it.
    rebuilds: Vec<usize>,
    coded: usize,
    reserve: u64,
}

struct Search<'a> {
    record: &'a StepRecord,
    limits: &'a Limits,
    /// What counts as within the budget.
    budget: u64,
    rebuilds: Vec<usize>,
    /// Units with the same bytes and the same recipe's cost, as a model's layers have them; each in the order of
    /// `rebuilds`, the kinds with the most bytes first.
    likes: Vec<Vec<usize>>,
    like_of: Vec<usize>,
    coded: Vec<usize>,
    /// Size of a large unit. Not the largest: a language model's logits are as large as twenty others.
    large: u64,
    best: Option<(Choice, Plan)>,
}

impl<'a> Search<'a> {
    fn new(record: &'a StepRecord, limits: &'a Limits) -> Self {
        let rebuilds = rebuild_order(record);
        let likes = likes(record, &rebuilds);
        let mut like_of = vec![usize::MAX; record.units.len()];
        for (number, like) in likes.iter().enumerate() {
            like.iter().for_each(|&index| like_of[index] = number);
        }
        let coded = coded_order(record);
        let mut sizes: Vec<u64> = record.units.iter().map(|unit| unit.bytes).collect();
        sizes.sort_unstable();
        let large = sizes.get(sizes.len() * 19 / 20).copied().unwrap_or(0);
        let budget = limits.budget_bytes;
        Self { record, limits, budget, rebuilds, likes, like_of, coded, large, best: None }
    }

    fn best(&self) -> Choice {
        self.best.as_ref().map(|(choice, _)| choice.clone()).unwrap_or_default()
    }

    /// `choice` with the first `count` units of the order of rebuilds.
    fn first(&self, count: usize, choice: Choice) -> Choice {
        let mut rebuilds = vec![0; self.likes.len()];
        for &index in &self.rebuilds[..count] {
            rebuilds[self.like_of[index]] += 1;
        }
        Choice { rebuilds, ..choice }
    }

    /// Whether the best plan costs nothing and keeps the budget: no other can be better.
    fn is_free(&self) -> bool {
        self.best.as_ref().is_some_and(|(_, Plan { predicted, .. })| {
            predicted.stall_us + predicted.rebuild_us + predicted.codec_us <= 0.0
                && self.excess(predicted) == 0
        })
    }

    /// Bytes by which a plan exceeds the device's budget and the host's.
    fn excess(&self, of: &Prediction) -> u64 {
        of.peak_bytes.saturating_sub(self.budget) + of.host_bytes.saturating_sub(self.limits.host_bytes)
    }

    fn settled(self) -> Plan {
        self.best.map(|(_, plan)| settle(self.record, self.limits, plan)).unwrap_or_default()
    }

    /// Shares of the rebuilds, with the rest of the best choice.
    fn try_rebuilds(&mut self) {
        let best = self.best();
        let steps = SHARES.min(self.rebuilds.len());
        for step in 0..=steps {
            self.attempt(self.first(self.rebuilds.len() * step / steps.max(1), best.clone()));
        }
    }

    /// The whole codec with every share of rebuilds, since it makes the dearest of them needless; then shares of it.
    fn try_coded(&mut self) {
        let (best, all) = (self.best(), self.coded.len());
        let steps = SHARES.min(self.rebuilds.len());
        for step in 0..=steps {
            let count = self.rebuilds.len() * step / steps.max(1);
            self.attempt(self.first(count, Choice { coded: all, ..best.clone() }));
        }
        for step in 1..4 {
            self.attempt(Choice { coded: all * step / 4, ..self.best() });
        }
    }

    /// Both numbers, in halving strides around the best.
    fn refine(&mut self) {
        let (rebuilds, coded) = (self.rebuilds.len(), self.coded.len());
        let mut strides = (rebuilds / SHARES / 2, coded / SHARES);
        // A hundredth of either is fine enough for long steps, where each is little of the whole.
        while strides.0 > rebuilds / 100 || self.best().coded > 0 && strides.1 > coded / 100 {
            let middle = self.best();
            let count: usize = middle.rebuilds.iter().sum();
            self.attempt(self.first(count.saturating_sub(strides.0), middle.clone()));
            self.attempt(self.first((count + strides.0).min(rebuilds), middle));
            self.vary_coded(strides.1);
            strides = (strides.0 / 2, strides.1 / 2);
        }
    }

    fn vary_coded(&mut self, stride: usize) {
        let middle = self.best();
        if middle.coded > 0 {
            self.attempt(Choice { coded: middle.coded.saturating_sub(stride), ..middle.clone() });
            self.attempt(Choice { coded: (middle.coded + stride).min(self.coded.len()), ..middle });
        }
    }

    fn vary_reserve(&mut self) {
        for share in RESERVES {
            self.attempt(Choice { reserve: share * self.large, ..self.best() });
        }
    }

    /// Kind by kind, more and fewer of it: the cheapest rebuild may be the one whose inputs have no room, or the one
    /// that the link has time for.
    fn vary_likes(&mut self) {
        let most = self.likes.len().min(LIKES);
        let mut left = MOST_LOOKS / self.record.units.len().max(1);
        for round in 0..ROUNDS {
            let before = self.best();
            for like in 0..most {
                let count = self.likes[like].len();
                let step = (count >> (round + 1)).max(1);
                let now = self.best().rebuilds[like];
                let tried = [0, count, now.saturating_sub(step), (now + step).min(count)];
                let tried = if round == 0 { &tried[..] } else { &tried[2..] };
                for &number in tried {
                    if left == 0 {
                        return;
                    }
                    left -= 1;
                    let mut choice = self.best();
                    choice.rebuilds[like] = number;
                    self.attempt(choice);
                }
            }
            self.vary_coded(self.coded.len() >> (round + 3));
            if self.best() == before && round > 0 {
                break;
            }
        }
    }

    fn attempt(&mut self, choice: Choice) {
        if self.best.as_ref().is_some_and(|(best, _)| *best == choice) {
            return;
        }
        let parts = self.likes.iter().zip(&choice.rebuilds);
        let rebuilt: Vec<usize> = parts.flat_map(|(like, &count)| &like[..count]).copied().collect();
        let coded = &self.coded[..choice.coded];
        let actions = choose(self.record, self.limits, &rebuilt, coded, choice.reserve);
        let (schedule, predicted) = simulate(self.record, &actions, self.limits);
        let price = |of: &Prediction| (self.excess(of), of.step_us);
        let better = self.best.as_ref().is_none_or(|(_, plan)| price(&predicted) < price(&plan.predicted));
        if better {
            self.best = Some((choice, Plan { actions, schedule, predicted }));
        }
    }
}

/// Units with a recipe, the most bytes a microsecond first; among equals the last packed, which the
/// link has the least time for.
fn rebuild_order(record: &StepRecord) -> Vec<usize> {
    let gain = |index: usize| {
        let unit = &record.units[index];
        let recipe = unit.recipe.as_ref()?;
        let narrow: u64 = recipe.inputs.iter().filter_map(|&input| narrow_bytes(record, input)).sum();
        Some(unit.bytes.saturating_sub(narrow) as f64 / recipe.cost_us.max(1e-3))
    };
    by_gain(record, gain)
}

fn narrow_bytes(record: &StepRecord, index: usize) -> Option<u64> {
    record.units.get(index).filter(|unit| unit.is_narrow).map(|unit| unit.bytes)
}

/// Units that the link codec makes smaller, the most bytes saved a microsecond first, among equals the last packed.
fn coded_order(record: &StepRecord) -> Vec<usize> {
    let gain = |index: usize| {
        let unit = &record.units[index];
        let coded = unit.coded.filter(|coded| coded.bytes < unit.bytes)?;
        Some((unit.bytes - coded.bytes) as f64 / (coded.encode_us + coded.decode_us).max(1e-3))
    };
    by_gain(record, gain)
}

fn by_gain(record: &StepRecord, gain: impl Fn(usize) -> Option<f64>) -> Vec<usize> {
    let mut order: Vec<_> =
        (0..record.units.len()).filter_map(|index| gain(index).map(|gain| (gain, index))).collect();
    order.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
    order.into_iter().map(|(_, index)| index).collect()
}

fn likes(record: &StepRecord, rebuilds: &[usize]) -> Vec<Vec<usize>> {
    let mut found: HashMap<(u64, u64, usize), Vec<usize>> = HashMap::new();
    for &index in rebuilds {
        let unit = &record.units[index];
        let Some(recipe) = &unit.recipe else { continue };
        found.entry((unit.bytes, recipe.cost_us.to_bits(), recipe.inputs.len())).or_default().push(index);
    }
    let mut likes: Vec<_> = found.into_values().collect();
    likes.sort_by_key(|like| (Reverse(record.units[like[0]].bytes * like.len() as u64), like[0]));
    likes
}
