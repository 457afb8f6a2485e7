//! One generation: how it was asked for, what is left of it, and what may be said of its text already.
//!
//! Plain data, so that a generation that was paused is taken up by another process.

use serde::{Deserialize, Serialize};

use crate::{
    scan::Scanner,
    tools::{self, MARKER, ToolCall},
};

/// Which route asked, and so what its answer looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// `/v1/completions`.
    Text,
    /// `/v1/chat/completions`.
    Chat,
}

/// How to generate.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Params {
    /// See [`Kind`].
    pub kind: Kind,
    /// Tokens at most.
    pub max_tokens: usize,
    /// Whether fewer will do where a session has no room for as many.
    pub open_ended: bool,
    /// 0: the likeliest token.
    pub temperature: f64,
    /// Share of the probability that is sampled from.
    pub top_p: f64,
    /// Of the random numbers.
    pub seed: u64,
    /// Strings that end it.
    pub stop: Vec<String>,
    /// How many alternatives are reported for each token.
    pub logprobs: Option<u8>,
    /// Whether calls of tools are looked for.
    pub has_tools: bool,
    /// How long a tool is expected to take.
    pub tool_eta_ms: Option<f64>,
}

/// See the module.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Progress {
    /// How it was asked for.
    pub params: Params,
    /// Tokens of the prompt, and those of them that the session had already.
    pub prompt_tokens: (u64, u64),
    /// Tokens that may still come.
    pub left: usize,
    stops: Scanner,
    marker: Scanner,
    call: Option<String>,
}

impl Progress {
    /// A generation that begins.
    pub fn new(params: Params, prompt_tokens: (u64, u64), left: usize) -> Self {
        let markers = if params.has_tools { vec![MARKER.to_owned()] } else { Vec::new() };
        let stops = Scanner::new(params.stop.clone());
        Self { params, prompt_tokens, left, stops, marker: Scanner::new(markers), call: None }
    }

    /// Adds text; what of it can be given out, and whether a stop string came.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        let found = self.stops.push(text);
        (self.without_calls(&found.text), found.after.is_some())
    }

    /// At the end: the rest of the text, and the calls of tools.
    pub fn finish(&mut self) -> (String, Option<Vec<ToolCall>>) {
        let rest = self.stops.flush();
        let mut text = self.without_calls(&rest);
        text.push_str(&self.marker.flush());
        let Some(call) = self.call.take() else { return (text, None) };
        match tools::parse(&call) {
            Some(calls) => (text, Some(calls)),
            // What looked like one is text after all.
            None => (text + MARKER + &call, None),
        }
    }

    fn without_calls(&mut self, text: &str) -> String {
        if let Some(call) = &mut self.call {
            call.push_str(text);
            return String::new();
        }
        let found = self.marker.push(text);
        self.call = found.after;
        found.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(stop: &[&str], has_tools: bool) -> Progress {
        let params = Params {
            kind: Kind::Chat,
            max_tokens: 9,
            open_ended: false,
            temperature: 0.0,
            top_p: 1.0,
            seed: 0,
            stop: stop.iter().map(|&stop| stop.to_owned()).collect(),
            logprobs: None,
            has_tools,
            tool_eta_ms: None,
        };
        Progress::new(params, (0, 0), 9)
    }

    #[test]
    fn a_call_is_not_text() {
        let mut one = progress(&[], true);
        let pieces = ["I look. <tool", "_call>{\"name\":", " \"f\"}</tool_call>"];
        let shown: String = pieces.iter().map(|piece| one.push(piece).0).collect();
        assert_eq!(shown, "I look. ");
        // It may go to disk in the middle.
        let mut one: Progress = serde_json::from_value(serde_json::to_value(&one).unwrap()).unwrap();
        let (rest, calls) = one.finish();
        assert_eq!((rest.as_str(), calls.unwrap().len()), ("", 1));
    }

    #[test]
    fn what_is_not_a_call_is_text() {
        let mut one = progress(&[], true);
        let (shown, _) = one.push("a<tool_call>b");
        assert_eq!(shown + &one.finish().0, "a<tool_call>b");
        let mut one = progress(&["!"], false);
        assert_eq!(one.push("a<tool_call>b!c"), ("a<tool_call>b".to_owned(), true));
        assert_eq!(one.finish().0, "");
    }
}
