//! Answers in the shapes of OpenAI: whole, or as chunks.

use serde_json::{Map, Value, json};

use crate::{executor::Logprob, progress::Kind, tools::ToolCall};

/// How a generation ended, or that it was paused.
#[derive(Debug)]
pub struct Done {
    /// `stop`, `length`, `tool_calls` or `paused`.
    pub finish: &'static str,
    /// Calls of tools.
    pub calls: Option<Vec<ToolCall>>,
    /// Tokens of the prompt, and those of them that the session had already.
    pub prompt_tokens: (u64, u64),
    /// Tokens of this answer.
    pub completion_tokens: u64,
}

/// What all parts of one answer have in common.
#[derive(Debug)]
pub struct Head {
    /// Which route asked.
    pub kind: Kind,
    /// Of the answer.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// Name of the model.
    pub model: String,
    /// The session, if it has a name.
    pub session: Option<String>,
}

/// Logprobs of one answer, as they come.
#[derive(Debug, Default)]
pub struct Logprobs(Vec<Logprob>);

impl Head {
    /// Of an answer that begins now.
    pub fn new(kind: Kind, model: &str, session: Option<String>, created: u64) -> Self {
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{prefix}-{:016x}{:08x}", fastrand::u64(..), fastrand::u32(..));
        Self { kind, id, created, model: model.to_owned(), session }
    }

    /// All of it at once.
    pub fn whole(&self, text: &str, logprobs: &Logprobs, done: &Done) -> Value {
        let logprobs = logprobs.to_json(self.kind);
        let (object, choice) = match self.kind {
            Kind::Text => ("text_completion", json!({"text": text, "logprobs": logprobs})),
            Kind::Chat => {
                let mut message = json!({"role": "assistant", "content": text, "refusal": null});
                if let Some(calls) = &done.calls {
                    message["tool_calls"] = json!(calls);
                }
                ("chat.completion", json!({"message": message, "logprobs": logprobs}))
            }
        };
        self.wrap(object, vec![finished(choice, Some(done.finish))], Some(usage(done)))
    }

    /// The role, which a chat begins with.
    pub fn opening(&self) -> Option<Value> {
        let delta = || json!({"delta": {"role": "assistant", "content": ""}, "logprobs": null});
        (self.kind == Kind::Chat).then(|| self.chunk(vec![finished(delta(), None)], None))
    }

    /// Some more text.
    pub fn piece(&self, text: &str, logprobs: &Logprobs) -> Value {
        let logprobs = logprobs.to_json(self.kind);
        let choice = match self.kind {
            Kind::Text => json!({"text": text, "logprobs": logprobs}),
            Kind::Chat => json!({"delta": {"content": text}, "logprobs": logprobs}),
        };
        self.chunk(vec![finished(choice, None)], None)
    }

    /// How it ended.
    pub fn closing(&self, done: &Done) -> Value {
        let choice = match self.kind {
            Kind::Text => json!({"text": "", "logprobs": null}),
            Kind::Chat => {
                let numbered = |(index, call): (usize, &ToolCall)| {
                    let mut call = json!(call);
                    call["index"] = json!(index);
                    call
                };
                let calls = done.calls.iter().flatten().enumerate().map(numbered).collect::<Vec<_>>();
                let delta = if calls.is_empty() { json!({}) } else { json!({"tool_calls": calls}) };
                json!({"delta": delta, "logprobs": null})
            }
        };
        self.chunk(vec![finished(choice, Some(done.finish))], None)
    }

    /// What it took.
    pub fn usage(&self, done: &Done) -> Value {
        self.chunk(Vec::new(), Some(usage(done)))
    }

    fn chunk(&self, choices: Vec<Value>, usage: Option<Value>) -> Value {
        let object = if self.kind == Kind::Chat { "chat.completion.chunk" } else { "text_completion" };
        self.wrap(object, choices, usage)
    }

    fn wrap(&self, object: &str, choices: Vec<Value>, usage: Option<Value>) -> Value {
        let mut value = json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices,
        });
        if let Some(usage) = usage {
            value["usage"] = usage;
        }
        if let Some(session) = &self.session {
            value["session_id"] = json!(session);
        }
        value
    }
}

impl Logprobs {
    /// Adds those of a token.
    pub fn push(&mut self, logprob: Logprob) {
        self.0.push(logprob);
    }

    fn to_json(&self, kind: Kind) -> Value {
        if self.0.is_empty() {
            return Value::Null;
        }
        if kind == Kind::Chat {
            let one = |token: &str, logprob: f64| json!({"token": token, "logprob": logprob, "bytes": token.as_bytes()});
            let content = self.0.iter().map(|found| {
                let mut entry = one(&found.token, found.logprob);
                entry["top_logprobs"] =
                    found.top.iter().map(|(token, logprob)| one(token, *logprob)).collect();
                entry
            });
            return json!({"content": content.collect::<Vec<_>>(), "refusal": null});
        }
        let top = |found: &Logprob| {
            Value::Object(Map::from_iter(found.top.iter().map(|(t, l)| (t.clone(), json!(l)))))
        };
        let mut offset = 0;
        let mut offsets = Vec::new();
        for found in &self.0 {
            offsets.push(offset);
            offset += found.token.chars().count();
        }
        json!({
            "tokens": self.0.iter().map(|found| &found.token).collect::<Vec<_>>(),
            "token_logprobs": self.0.iter().map(|found| found.logprob).collect::<Vec<_>>(),
            "top_logprobs": self.0.iter().map(top).collect::<Vec<_>>(),
            "text_offset": offsets,
        })
    }
}

fn finished(mut choice: Value, finish: Option<&str>) -> Value {
    choice["index"] = json!(0);
    choice["finish_reason"] = json!(finish);
    choice
}

fn usage(done: &Done) -> Value {
    let (prompt, cached) = done.prompt_tokens;
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": done.completion_tokens,
        "total_tokens": prompt + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    })
}
