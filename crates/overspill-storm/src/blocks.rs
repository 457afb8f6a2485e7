//! What a training step of a Llama-like model will save and need, and when, by arithmetic: a record to plan
//! from before anything runs.
//!
//! Shapes and dtypes are those of transformers' Llama in 16 bit: norms keep a 32-bit copy of their input,
//! nothing is fused. Times are matmuls at the device's matmul speed plus all else at its memory's speed.
//! Attention is causal and keeps no scores. With an adapter the model's own weights are frozen, so that norms and
//! matmuls save less, and less has a recipe. Does not know of optimizers, fragmentation, or other models.

use crate::{Coded, Event, Recipe, StepRecord, Unit};

/// Shape of the model and of one batch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Shape {
    /// Decoder layers.
    pub layers: u64,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Width inside the feed-forward block.
    pub inner: u64,
    /// Width of keys and of values: `hidden`, or less with grouped queries.
    pub kv: u64,
    /// Words of the vocabulary; 0 leaves out embedding, head and loss.
    pub vocab: u64,
    /// Whether the head uses the embedding's weights.
    pub is_tied: bool,
    /// Rank of low-rank adapters of queries and values, which alone are trained; 0 trains every weight.
    pub adapter_rank: u64,
    /// Whether head and loss are one operation that takes the logits in pieces and makes their gradients in forward.
    pub has_fused_loss: bool,
    /// Sequences of a batch.
    pub batch: u64,
    /// Tokens of a sequence.
    pub sequence: u64,
}

/// What a device does in a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speeds {
    /// 16-bit matmuls as they are reached, floating-point operations.
    pub matmul_flops: f64,
    /// Device memory, bytes.
    pub memory_bytes: f64,
}

/// Memory traffic of a block beside its matmuls, bytes a token and hidden unit, forward and backward: what
/// three steps on one H200 leave when their matmuls are taken off (h = 2048, 4096, 8192 took 242.6, 359.1
/// and 600.3 ms, which this gives within 6%).
const TRAFFIC_BYTES: f64 = 1_050.0;
/// What the link codec makes of 16-bit activations, and its speed as a share of the memory's: 11.2 of 16 bits, and
/// 1.65 TB/s where the memory does 4.8 (`bench/results/tpde_gpu.json`).
const CODED: f64 = 11.2 / 16.0;
const CODEC_SPEED: f64 = 1.65 / 4.8;
/// Share of that traffic in forward.
const FORWARD: f64 = 1.0 / 3.0;

impl Shape {
    /// Weights of the model.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        let attention = 2 * self.hidden * (self.hidden + self.kv);
        let block = attention + 3 * self.hidden * self.inner + 2 * self.hidden;
        let tables = if self.is_tied { 1 } else { 2 };
        self.layers * block + tables * self.vocab * self.hidden + self.hidden
    }

    /// Weights that are trained.
    #[must_use]
    pub fn trained(&self) -> u64 {
        let adapters = self.layers * self.adapter_rank * (3 * self.hidden + self.kv);
        if self.is_frozen() { adapters } else { self.parameters() }
    }

    fn is_frozen(&self) -> bool {
        self.adapter_rank > 0
    }

    /// Matmuls of a weight in backward: the input's gradient, and the weight's own.
    fn backward_matmuls(&self) -> f64 {
        if self.is_frozen() { 1.0 } else { 2.0 }
    }

    /// Tokens of a batch.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.batch * self.sequence
    }

    /// The step, on a device on which `fixed_bytes` are taken whatever is decided.
    #[must_use]
    pub fn step(&self, speeds: &Speeds, fixed_bytes: u64) -> StepRecord {
        let mut step =
            Step { shape: *self, speeds: *speeds, fixed_bytes, record: StepRecord::default(), now_us: 0.0 };
        let blocks: Vec<_> = (0..self.layers).map(|_| step.block()).collect();
        if self.vocab > 0 {
            step.head();
        }
        for units in blocks.iter().rev() {
            step.block_backward(units);
        }
        step.record
    }
}

struct Step {
    shape: Shape,
    speeds: Speeds,
    fixed_bytes: u64,
    record: StepRecord,
    now_us: f64,
}

impl Step {
    /// Bytes of a 16-bit activation of `width`.
    fn wide(&self, width: u64) -> u64 {
        2 * self.shape.tokens() * width
    }

    /// Time of a matmul over all tokens.
    fn matmul_us(&self, rows: u64, columns: u64) -> f64 {
        2.0 * self.shape.tokens() as f64 * rows as f64 * columns as f64 / self.speeds.matmul_flops * 1e6
    }

    /// Time of causal attention in forward.
    fn attention_us(&self) -> f64 {
        let Shape { hidden, sequence, .. } = self.shape;
        2.0 * self.shape.tokens() as f64 * sequence as f64 * hidden as f64 / self.speeds.matmul_flops * 1e6
    }

    fn traffic_us(&self) -> f64 {
        TRAFFIC_BYTES * self.shape.tokens() as f64 * self.shape.hidden as f64 / self.speeds.memory_bytes * 1e6
    }

    fn block(&mut self) -> Vec<usize> {
        let Shape { hidden, inner, kv, .. } = self.shape;
        let traffic_us = self.traffic_us() * FORWARD / 11.0;
        let mut units = self.norm(traffic_us, true);
        let input = units[units.len() - 1];
        self.pack(self.wide(hidden), self.matmul_us(hidden, hidden) + traffic_us, &mut units); // queries
        self.pack(self.wide(kv), self.matmul_us(hidden, kv) + traffic_us, &mut units); // keys
        let values = self.pack(self.wide(kv), self.matmul_us(hidden, kv), &mut units);
        if !self.shape.is_frozen() {
            self.recipe(values, vec![input], self.matmul_us(hidden, kv));
        }
        self.pack(self.wide(hidden), self.attention_us() + traffic_us, &mut units);
        self.now_us += self.matmul_us(hidden, hidden) + traffic_us;
        units.extend(self.norm(traffic_us, false));
        let input = units[units.len() - 1];
        let up_us = self.matmul_us(hidden, inner);
        let gate = self.pack(self.wide(inner), up_us, &mut units);
        let silu = self.pack(self.wide(inner), traffic_us, &mut units);
        let up = self.pack(self.wide(inner), up_us, &mut units);
        self.recipe(silu, vec![gate], self.moved_us(2 * self.wide(inner)));
        if self.shape.is_frozen() {
            self.now_us += traffic_us;
        } else {
            let product = self.pack(self.wide(inner), traffic_us, &mut units);
            self.recipe(gate, vec![input], up_us);
            self.recipe(up, vec![input], up_us);
            self.recipe(product, vec![silu, up], self.moved_us(3 * self.wide(inner)));
        }
        self.now_us += up_us + 2.0 * traffic_us;
        units
    }

    /// The 32-bit input with its narrow copy, the normalised cast, the weighted result. A frozen norm saves the first;
    /// each of two adapters that read its result saves that in 32 bit, as peft's do.
    fn norm(&mut self, traffic_us: f64, has_adapter: bool) -> Vec<usize> {
        let bytes = self.wide(self.shape.hidden);
        let mut units = Vec::new();
        let wide = self.widened(bytes, traffic_us / 2.0, &mut units);
        if self.shape.is_frozen() {
            for _ in 0..if has_adapter { 2 } else { 0 } {
                self.widened(bytes, traffic_us / 2.0, &mut units);
            }
            return units;
        }
        let normal = self.pack(bytes, traffic_us / 2.0, &mut units);
        let weighted = self.pack(bytes, traffic_us / 2.0, &mut units);
        self.recipe(normal, vec![wide], self.moved_us(7 * bytes));
        self.recipe(weighted, vec![normal], self.moved_us(2 * bytes));
        units
    }

    /// A 32-bit copy of `bytes` in 16 bit, and the narrow copy that it can be made from.
    fn widened(&mut self, bytes: u64, after_us: f64, units: &mut Vec<usize>) -> usize {
        let wide = self.pack(2 * bytes, after_us, units);
        let narrow = self.pack(bytes, 0.0, units);
        self.record.units[narrow].is_narrow = true;
        self.record.units[wide].coded = None;
        self.recipe(wide, vec![narrow], self.moved_us(3 * bytes));
        wide
    }

    /// Head and loss, forward and backward: the probabilities in 32 bit are saved, their logits and
    /// gradients are there for a moment. A fused loss saves gradients of its input and of the head, and holds as many
    /// logits at once as the input has values.
    fn head(&mut self) {
        let Shape { hidden, vocab, has_fused_loss, .. } = self.shape;
        let matmuls = self.shape.backward_matmuls();
        if has_fused_loss {
            let us = (1.0 + matmuls) * self.matmul_us(hidden, vocab) + self.moved_us(5 * self.wide(vocab));
            let weight = if self.shape.is_frozen() { 0 } else { 2 * hidden * vocab };
            self.now_us += us;
            self.event(3 * self.wide(hidden) + weight);
            let saved = self.pack(self.wide(hidden) + weight, 0.0, &mut Vec::new());
            let at = self.event(self.wide(hidden));
            self.record.units[saved].needed_at = Some(at);
            self.record.units[saved].freed_at = Some(self.event(0));
            return;
        }
        let logits = self.wide(vocab);
        let forward_us = self.matmul_us(hidden, vocab) + self.moved_us(5 * logits);
        let mut units = Vec::new();
        let saved = self.pack(2 * logits, forward_us, &mut units);
        self.record.units[saved].coded = None;
        self.now_us += self.moved_us(3 * logits);
        let at = self.event(3 * logits);
        self.record.units[saved].needed_at = Some(at);
        let at = self.event(3 * logits);
        self.record.units[saved].freed_at = Some(at);
        self.now_us += matmuls * self.matmul_us(hidden, vocab);
    }

    /// The units of a block are needed last packed first, matmuls' shares of the time spread over them.
    fn block_backward(&mut self, units: &[usize]) {
        let Shape { hidden, inner, kv, .. } = self.shape;
        let matmuls = self.shape.backward_matmuls();
        let matmuls_us = matmuls * self.matmul_us(hidden, 2 * hidden + 2 * kv + 3 * inner);
        let all_us = matmuls_us + 2.5 * self.attention_us() + self.traffic_us() * (1.0 - FORWARD);
        let asked: Vec<_> = units.iter().rev().filter(|&&unit| !self.record.units[unit].is_narrow).collect();
        for &&unit in &asked {
            self.now_us += all_us / asked.len() as f64;
            let at = self.event(3 * self.wide(inner));
            self.record.units[unit].needed_at = Some(at);
            let at = self.event(3 * self.wide(inner));
            self.record.units[unit].freed_at = Some(at);
            if let Some(next) = self.record.units.get_mut(unit + 1).filter(|next| next.is_narrow) {
                next.freed_at = Some(at);
            }
        }
    }

    fn moved_us(&self, bytes: u64) -> f64 {
        bytes as f64 / self.speeds.memory_bytes * 1e6
    }

    fn pack(&mut self, bytes: u64, after_us: f64, units: &mut Vec<usize>) -> usize {
        self.now_us += after_us;
        let at = self.event(bytes);
        let codec_us = bytes as f64 / (self.speeds.memory_bytes * CODEC_SPEED) * 1e6;
        let coded = Coded { bytes: (bytes as f64 * CODED) as u64, encode_us: codec_us, decode_us: codec_us };
        self.record.units.push(Unit { coded: Some(coded), ..Unit::packed(bytes, at) });
        units.push(self.record.units.len() - 1);
        self.record.units.len() - 1
    }

    fn recipe(&mut self, unit: usize, inputs: Vec<usize>, cost_us: f64) {
        self.record.units[unit].recipe = Some(Recipe { inputs, cost_us });
    }

    fn event(&mut self, working_bytes: u64) -> usize {
        let other_bytes = self.fixed_bytes + working_bytes;
        self.record.events.push(Event { time_us: self.now_us, other_bytes });
        self.record.events.len() - 1
    }
}
