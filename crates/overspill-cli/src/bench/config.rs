//! The experiment file, and the bytes that follow from it.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};

use crate::Failure;

/// An experiment; GB are 1e9 bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What it is called.
    pub name: String,
    /// The model's shape and where its weights come from.
    pub model: Model,
    /// "cuda" or "cpu".
    pub device: String,
    /// What the device may show in use: weights, sessions, workspace and all else.
    pub cap_gb: f64,
    /// Of it, for what is neither weights nor sessions: the driver's context, activations, graphs.
    pub workspace_gb: f64,
    /// Page-locked host memory for the sessions' copies.
    pub host_gb: f64,
    /// Disk behind it; 0: none.
    #[serde(default)]
    pub disk_gb: f64,
    /// Sessions.
    pub sessions: u32,
    /// Tokens of each session's prompt.
    pub prompt_tokens: u32,
    /// Tokens that each session generates.
    pub new_tokens: u32,
    /// Tokens that a session generates before others have their turn.
    pub tokens_per_turn: u32,
    /// Sessions that decode together, at most.
    pub rows: u32,
    /// Where every session pauses.
    #[serde(default)]
    pub breaks: Vec<Break>,
    /// A layer of the sessions whose hidden state is changed, in every forward.
    #[serde(default)]
    pub steer_layer: Option<u32>,
    /// Sessions that come and go, instead of turns in a ring.
    #[serde(default)]
    pub agents: Option<Agents>,
    /// Whether the oracle holds one group of sessions after the other, where all at once do not fit.
    #[serde(default)]
    pub oracle_by_group: bool,
    /// What the arithmetic takes for the machine's speeds.
    pub expect: Expect,
    /// Whether the ways of others are measured too.
    #[serde(default)]
    pub baselines: bool,
    /// Where random prompts, weights and arrivals start from.
    #[serde(default)]
    pub seed: u64,
}

/// A decoder.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// "random", or "smollm2" for the weights that the demo unpacks.
    pub weights: String,
    /// "float16", "bfloat16" or "float32".
    pub dtype: String,
    /// Decoder layers.
    pub layers: u32,
    /// Hidden size.
    pub hidden: u32,
    /// Inner size of the feed-forward part.
    pub inner: u32,
    /// Attention heads.
    pub heads: u32,
    /// Heads of keys and values.
    pub kv_heads: u32,
    /// Vocabulary.
    pub vocab: u32,
    /// Whether the head is the embedding.
    #[serde(default)]
    pub tied: bool,
}

/// A breakpoint: after `layer` of forward `step` (0: over the prompt; k: of the k-th new token).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Break {
    /// Forward.
    pub step: u32,
    /// Layer.
    pub layer: u32,
}

/// Sessions that arrive at random and wait for tools; time is counted in decode steps.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agents {
    /// Steps between two arrivals, on average (Poisson).
    pub arrival_steps: f64,
    /// Steps that a tool takes, on average (exponential).
    pub tool_steps: f64,
}

/// What the arithmetic assumes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// One direction of the link.
    pub link_gbps: f64,
    /// A prompt.
    pub prefill_ms: f64,
    /// A decode step of `rows` sessions.
    pub step_ms: f64,
}

impl Config {
    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let text = fs::read_to_string(path).map_err(|error| super::failed(path, &error))?;
        Self::parse(&text).map_err(|error| match error {
            Failure::Misuse(what) => Failure::Misuse(format!("{}: {what}", path.display())),
            failed @ Failure::Failed(_) => failed,
        })
    }

    /// Parses and checks the text of one.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let config: Self =
            serde_yaml_ng::from_str(text).map_err(|error| Failure::Misuse(error.to_string()))?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), Failure> {
        let model = &self.model;
        let counts = [
            ("sessions", self.sessions),
            ("prompt_tokens", self.prompt_tokens),
            ("new_tokens", self.new_tokens),
            ("tokens_per_turn", self.tokens_per_turn),
            ("rows", self.rows),
            ("layers", model.layers),
            ("hidden", model.hidden),
            ("heads", model.heads),
            ("kv_heads", model.kv_heads),
            ("vocab", model.vocab),
        ];
        if let Some((name, count)) = counts.into_iter().find(|(_, count)| !(1..=1 << 20).contains(count)) {
            return misuse(format!("{name} is {count}"));
        }
        let sizes = [
            ("cap_gb", self.cap_gb),
            ("workspace_gb", self.workspace_gb),
            ("host_gb", self.host_gb),
            ("link_gbps", self.expect.link_gbps),
            ("step_ms", self.expect.step_ms),
        ];
        if let Some((name, size)) = sizes.into_iter().find(|(_, size)| !(*size > 0.0 && *size < 1e6)) {
            return misuse(format!("{name} is {size}"));
        }
        if !(0.0..1e6).contains(&self.disk_gb) {
            return misuse(format!("disk_gb is {}", self.disk_gb));
        }
        if let Some(agents) = &self.agents
            && [agents.arrival_steps, agents.tool_steps].iter().any(|steps| !(*steps > 0.0 && *steps < 1e9))
        {
            return misuse("agents: steps have to be positive".to_owned());
        }
        if self.agents.is_some() && !self.breaks.is_empty() {
            return misuse("agents do not pause within forwards: no breaks".to_owned());
        }
        if let Some(one) =
            self.breaks.iter().find(|one| one.layer >= model.layers || one.step >= self.new_tokens)
        {
            return misuse(format!("no layer {} of step {} is run", one.layer, one.step));
        }
        if !model.hidden.is_multiple_of(model.heads) || !model.heads.is_multiple_of(model.kv_heads) {
            return misuse("heads do not divide".to_owned());
        }
        self.dtype_bytes().map(|_| ())
    }

    fn dtype_bytes(&self) -> Result<u64, Failure> {
        match self.model.dtype.as_str() {
            "float16" | "bfloat16" => Ok(2),
            "float32" => Ok(4),
            other => misuse(format!("dtype is {other:?}")),
        }
    }

    /// Bytes of the weights.
    pub fn weight_bytes(&self) -> Result<u64, Failure> {
        let Model { layers, hidden, inner, heads, kv_heads, vocab, tied, .. } = &self.model;
        let [layers, hidden, inner, heads, kv_heads, vocab] =
            [layers, hidden, inner, heads, kv_heads, vocab].map(|&size| u64::from(size));
        let kv = hidden / heads * kv_heads;
        let layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden;
        let tables = if *tied { 1 } else { 2 } * vocab * hidden;
        Ok((layers * layer + tables + hidden) * self.dtype_bytes()?)
    }

    /// Bytes of the keys and values of one token, all layers together.
    pub fn token_bytes(&self) -> Result<u64, Failure> {
        let model = &self.model;
        let kv = u64::from(model.hidden / model.heads * model.kv_heads);
        Ok(2 * u64::from(model.layers) * kv * self.dtype_bytes()?)
    }

    /// Most tokens of a session: the last one generated has not been through the model.
    pub fn slab_tokens(&self) -> u32 {
        self.prompt_tokens + self.new_tokens
    }
}

fn misuse<T>(what: String) -> Result<T, Failure> {
    Err(Failure::Misuse(what))
}
