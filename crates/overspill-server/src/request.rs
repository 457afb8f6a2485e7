//! Bodies of requests: what they ask for, or which parameter is wrong.
//!
//! What this server does not have is refused where it would change the answer, and ignored where not.

use std::ops::RangeInclusive;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::{
    Error, Limits, Result,
    progress::{Kind, Params},
};

const MAX_MESSAGES: usize = 4096;
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;

/// What comes after all that a session has seen.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Prompt {
    /// Text, as it is.
    Text(String),
    /// Tokens, as they are.
    Tokens(Vec<u64>),
    /// Messages: the new ones, or the whole conversation.
    Chat {
        /// Each with `role` and `content` of text.
        messages: Vec<Value>,
        /// As the model's template takes them.
        tools: Option<Value>,
    },
}

/// A request to generate.
#[derive(Debug, Clone)]
pub struct Generate {
    /// The session that it continues; none: one of its own, gone afterwards.
    pub session: Option<String>,
    /// What to run.
    pub prompt: Prompt,
    /// How to go on from there.
    pub params: Params,
    /// How it is answered.
    pub delivery: Delivery,
    /// Whether its steps are never batched with others'.
    pub exact: bool,
}

/// How an answer is delivered.
#[derive(Debug, Clone, Copy)]
pub struct Delivery {
    /// As events.
    pub stream: bool,
    /// With usage in the last event.
    pub usage: bool,
}

/// A JSON object whose members are taken one by one.
pub struct Fields(Map<String, Value>);

impl Fields {
    /// Of a body. An empty one is an empty object.
    pub fn parse(body: &[u8]) -> Result<Self> {
        if body.iter().all(u8::is_ascii_whitespace) {
            return Ok(Self(Map::new()));
        }
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(_) => Err(Error::Invalid { message: "the body has to be a JSON object".into(), param: None }),
            Err(error) => {
                Err(Error::Invalid { message: format!("the body is not JSON: {error}"), param: None })
            }
        }
    }

    /// A member that is there and is not null.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    /// A string.
    pub fn text(&mut self, name: &'static str) -> Result<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(Error::invalid(name, format!("{name} has to be a string"))),
        }
    }

    /// True or false; false if it is not there.
    pub fn flag(&mut self, name: &'static str) -> Result<bool> {
        match self.take(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(_) => Err(Error::invalid(name, format!("{name} has to be true or false"))),
        }
    }

    /// A number in `range`.
    pub fn number(&mut self, name: &'static str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => {
                let (low, high) = range.into_inner();
                Err(Error::invalid(name, format!("{name} has to be a number from {low} to {high}")))
            }
        }
    }

    /// A whole number in `range`.
    pub fn count(&mut self, name: &'static str, range: RangeInclusive<u64>) -> Result<Option<u64>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_u64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => {
                let (low, high) = range.into_inner();
                Err(Error::invalid(name, format!("{name} has to be a whole number from {low} to {high}")))
            }
        }
    }

    /// Refuses a member unless it says what it would say if it were not there.
    fn refuse_unless(&mut self, param: &'static str, same: impl Fn(&Value) -> bool) -> Result<()> {
        match self.take(param) {
            Some(value) if !same(&value) => Err(Error::Unsupported { param }),
            _ => Ok(()),
        }
    }
}

/// The name of a session: 1 to 64 of `A-Z a-z 0-9 . _ -`.
pub fn session_name(name: String, param: &'static str) -> Result<String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if (1..=64).contains(&name.len()) && name.bytes().all(fits) {
        return Ok(name);
    }
    Err(Error::invalid(param, format!("{param} has to be 1 to 64 of A-Z a-z 0-9 . _ -")))
}

/// The body of `/v1/completions` or `/v1/chat/completions`, for the model called `model`.
pub fn generate(body: &[u8], kind: Kind, model: &str, limits: &Limits) -> Result<Generate> {
    let mut fields = Fields::parse(body)?;
    if let Some(asked) = fields.text("model")?
        && asked != model
    {
        return Err(Error::NoModel { model: asked });
    }
    refuse_what_is_missing(&mut fields)?;
    let session = fields.text("session_id")?.map(|name| session_name(name, "session_id")).transpose()?;
    let (prompt, has_tools) = match kind {
        Kind::Text => (text_prompt(&mut fields)?, false),
        Kind::Chat => chat_prompt(&mut fields)?,
    };
    let delivery = delivery(&mut fields)?;
    let exact = fields.flag("exact")?;
    let params = params(&mut fields, kind, has_tools, limits)?;
    Ok(Generate { session, prompt, params, delivery, exact })
}

/// `stream` and `stream_options`.
pub fn delivery(fields: &mut Fields) -> Result<Delivery> {
    let stream = fields.flag("stream")?;
    let usage = match fields.take("stream_options") {
        None => false,
        Some(Value::Object(options)) => Fields(options).flag("include_usage")?,
        Some(_) => return Err(Error::invalid("stream_options", "stream_options has to be an object")),
    };
    Ok(Delivery { stream, usage })
}

fn refuse_what_is_missing(fields: &mut Fields) -> Result<()> {
    let is_one = |value: &Value| value.as_u64() == Some(1);
    let is_zero = |value: &Value| value.as_f64() == Some(0.0);
    let is_empty = |value: &Value| value.as_object().is_some_and(Map::is_empty);
    fields.refuse_unless("n", is_one)?;
    fields.refuse_unless("best_of", is_one)?;
    fields.refuse_unless("echo", |value| value.as_bool() == Some(false))?;
    fields.refuse_unless("suffix", |value| value.as_str() == Some(""))?;
    fields.refuse_unless("presence_penalty", is_zero)?;
    fields.refuse_unless("frequency_penalty", is_zero)?;
    fields.refuse_unless("logit_bias", is_empty)?;
    fields.refuse_unless("response_format", |value| value.get("type").and_then(Value::as_str) == Some("text"))
}

fn params(fields: &mut Fields, kind: Kind, has_tools: bool, limits: &Limits) -> Result<Params> {
    let most = limits.max_tokens as u64;
    let older = fields.count("max_tokens", 1..=most)?;
    let newer = fields.count("max_completion_tokens", 1..=most)?;
    // As OpenAI has it: 16 for completions, all there is room for in a chat.
    let max_tokens = newer.or(older).unwrap_or(if kind == Kind::Text { 16 } else { most });
    let seed = match fields.take("seed") {
        None => fastrand::u64(..),
        Some(value) => value
            .as_i64()
            .map(i64::cast_unsigned)
            .or(value.as_u64())
            .ok_or_else(|| Error::invalid("seed", "seed has to be a whole number of 64 bits"))?,
    };
    Ok(Params {
        kind,
        max_tokens: max_tokens as usize,
        open_ended: newer.or(older).is_none() && kind == Kind::Chat,
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
        top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0),
        seed,
        stop: stops(fields)?,
        logprobs: logprobs(fields, kind)?,
        has_tools,
        tool_eta_ms: fields.number("tool_eta_ms", 0.0..=86_400_000.0)?,
    })
}

/// `logprobs` is a count in completions; in a chat it is a flag, and `top_logprobs` is the count.
fn logprobs(fields: &mut Fields, kind: Kind) -> Result<Option<u8>> {
    if kind == Kind::Text {
        return Ok(fields.count("logprobs", 0..=20)?.map(|count| count as u8));
    }
    let (wanted, count) = (fields.flag("logprobs")?, fields.count("top_logprobs", 0..=20)?);
    if !wanted && count.is_some() {
        return Err(Error::invalid("top_logprobs", "top_logprobs needs logprobs: true"));
    }
    Ok(wanted.then(|| count.unwrap_or(0) as u8))
}

fn stops(fields: &mut Fields) -> Result<Vec<String>> {
    let wrong =
        || Error::invalid("stop", format!("stop has to be a string or up to {MAX_STOPS} of them, not empty"));
    let listed = match fields.take("stop") {
        None => Vec::new(),
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(list)) if list.len() <= MAX_STOPS => list
            .into_iter()
            .map(|one| if let Value::String(one) = one { Ok(one) } else { Err(wrong()) })
            .collect::<Result<_>>()?,
        Some(_) => return Err(wrong()),
    };
    if listed.iter().any(|one| one.is_empty() || one.len() > MAX_STOP_BYTES) {
        return Err(wrong());
    }
    Ok(listed)
}

fn text_prompt(fields: &mut Fields) -> Result<Prompt> {
    let wrong = || Error::invalid("prompt", "prompt has to be one string, or tokens");
    match fields.take("prompt") {
        Some(Value::String(text)) => Ok(Prompt::Text(text)),
        Some(Value::Array(mut list)) => match list.as_mut_slice() {
            [Value::String(text)] => Ok(Prompt::Text(std::mem::take(text))),
            [Value::Array(tokens)] => tokens_of(tokens).ok_or_else(wrong),
            tokens => tokens_of(tokens).ok_or_else(wrong),
        },
        _ => Err(wrong()),
    }
}

fn tokens_of(list: &[Value]) -> Option<Prompt> {
    let tokens: Option<Vec<u64>> = list.iter().map(Value::as_u64).collect();
    tokens.filter(|tokens| !tokens.is_empty()).map(Prompt::Tokens)
}

fn chat_prompt(fields: &mut Fields) -> Result<(Prompt, bool)> {
    let wrong = |message: &str| Error::invalid("messages", message);
    let Some(Value::Array(list)) = fields.take("messages") else {
        return Err(wrong("messages has to be a list"));
    };
    if list.is_empty() || list.len() > MAX_MESSAGES {
        return Err(wrong("messages has to have 1 to 4096 entries"));
    }
    let messages = list.into_iter().map(message).collect::<Result<Vec<_>>>()?;
    let tools = match fields.take("tools") {
        None => None,
        Some(Value::Array(list)) if list.is_empty() => None,
        Some(Value::Array(list)) if list.iter().all(is_tool) => Some(Value::Array(list)),
        Some(_) => return Err(Error::invalid("tools", "tools has to be a list of functions with names")),
    };
    let choice = fields.take("tool_choice");
    let chosen = match choice.as_ref().map(Value::as_str) {
        None => true,
        Some(Some("auto")) => true,
        Some(Some("none")) => false,
        Some(_) => return Err(Error::Unsupported { param: "tool_choice" }),
    };
    let tools = tools.filter(|_| chosen);
    let has_tools = tools.is_some();
    Ok((Prompt::Chat { messages, tools }, has_tools))
}

fn is_tool(tool: &Value) -> bool {
    tool.get("function").and_then(|function| function.get("name")).is_some_and(Value::is_string)
}

/// A message with its content as one text.
fn message(found: Value) -> Result<Value> {
    let wrong = |message: &str| Error::invalid("messages", message);
    let Value::Object(mut found) = found else { return Err(wrong("a message has to be an object")) };
    let role = match found.get("role").and_then(Value::as_str) {
        Some("developer" | "system") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some("tool") => "tool",
        _ => return Err(wrong("role has to be system, developer, user, assistant or tool")),
    };
    let mut kept = Map::from_iter([("role".to_owned(), Value::from(role))]);
    let content = match found.remove("content") {
        Some(Value::String(text)) => text,
        None | Some(Value::Null) if role == "assistant" => String::new(),
        Some(Value::Array(parts)) => parts.iter().map(part).collect::<Option<String>>().ok_or_else(|| {
            wrong("content has to be text, or parts of text: other parts are not supported")
        })?,
        _ => return Err(wrong("content has to be text, or a list of parts")),
    };
    kept.insert("content".to_owned(), Value::from(content));
    for name in ["name", "tool_call_id"] {
        match found.remove(name) {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => drop(kept.insert(name.to_owned(), Value::from(text))),
            Some(_) => return Err(wrong("name and tool_call_id have to be strings")),
        }
    }
    match found.remove("tool_calls") {
        None | Some(Value::Null) => {}
        Some(Value::Array(calls)) if calls.iter().all(is_tool) => {
            kept.insert("tool_calls".to_owned(), Value::Array(calls));
        }
        Some(_) => return Err(wrong("tool_calls has to be a list of calls of functions")),
    }
    Ok(Value::Object(kept))
}

fn part(part: &Value) -> Option<&str> {
    (part.get("type")?.as_str()? == "text").then(|| part.get("text")?.as_str()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(body: &str) -> Result<Generate> {
        generate(body.as_bytes(), Kind::Chat, "m", &Limits::default())
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            (r#"{}"#, "messages"),
            (r#"{"messages": []}"#, "messages"),
            (r#"{"messages": [{"role": "user", "content": 3}]}"#, "messages"),
            (r#"{"messages": [{"role": "king", "content": ""}]}"#, "messages"),
            (r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#, "messages"),
            (r#"{"messages": [{"role": "user", "content": ""}], "temperature": 3}"#, "temperature"),
            (r#"{"messages": [{"role": "user", "content": ""}], "max_tokens": 0}"#, "max_tokens"),
            (r#"{"messages": [{"role": "user", "content": ""}], "max_tokens": 1.5}"#, "max_tokens"),
            (r#"{"messages": [{"role": "user", "content": ""}], "stop": [""]}"#, "stop"),
            (r#"{"messages": [{"role": "user", "content": ""}], "seed": "x"}"#, "seed"),
            (r#"{"messages": [{"role": "user", "content": ""}], "session_id": "a/b"}"#, "session_id"),
            (r#"{"messages": [{"role": "user", "content": ""}], "top_logprobs": 2}"#, "top_logprobs"),
        ];
        for (body, expected) in cases {
            match chat(body) {
                Err(Error::Invalid { param: Some(param), .. }) => assert_eq!(param, expected, "{body}"),
                other => panic!("{body}: {other:?}"),
            }
        }
        let unsupported = r#"{"messages": [{"role": "user", "content": ""}], "n": 2}"#;
        assert!(matches!(chat(unsupported), Err(Error::Unsupported { param: "n" })));
        let other = r#"{"model": "x", "messages": [{"role": "user", "content": ""}]}"#;
        assert!(matches!(chat(other), Err(Error::NoModel { .. })));
        assert!(matches!(chat("[1]"), Err(Error::Invalid { param: None, .. })));
    }

    #[test]
    fn parts_of_text_are_one_text() {
        let body = r#"{"model": "m", "messages": [{"role": "developer", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]}],
            "stop": "x", "temperature": 0, "presence_penalty": 0.0, "user": "someone"}"#;
        let found = chat(body).unwrap();
        let Prompt::Chat { messages, tools: None } = found.prompt else { panic!("not a chat") };
        assert_eq!(messages[0]["role"], "system");
        assert_eq!(messages[1]["content"], "bc");
        assert_eq!(found.params.stop, ["x"]);
        assert!(!found.delivery.stream);
    }
}
