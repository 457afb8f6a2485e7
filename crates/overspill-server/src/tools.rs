//! Calls of tools, as Hermes, Qwen and SmolLM2 write them: JSON between `<tool_call>` and `</tool_call>`.

use serde::Serialize;
use serde_json::Value;

/// What a call starts with.
pub const MARKER: &str = "<tool_call>";
const END: &str = "</tool_call>";

/// One call, as OpenAI's clients read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ToolCall {
    id: String,
    r#type: &'static str,
    function: Function,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Function {
    name: String,
    arguments: String,
}

/// The calls in what came after the first [`MARKER`]; none if any of it is not a call.
pub fn parse(text: &str) -> Option<Vec<ToolCall>> {
    let mut calls = Vec::new();
    for block in text.split(MARKER) {
        let body = block.split(END).next().unwrap_or(block).trim();
        let found: Value = serde_json::from_str(body).ok()?;
        let listed = if let Value::Array(list) = found { list } else { vec![found] };
        for call in listed {
            let name = call.get("name")?.as_str()?.to_owned();
            let arguments = match call.get("arguments") {
                None => "{}".to_owned(),
                Some(Value::String(text)) => text.clone(),
                Some(value) => value.to_string(),
            };
            let id = format!("call_{:016x}", fastrand::u64(..));
            calls.push(ToolCall { id, r#type: "function", function: Function { name, arguments } });
        }
    }
    (!calls.is_empty()).then_some(calls)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_several_and_none() {
        let names = |text| parse(text).map(|calls| calls.into_iter().map(|c| c.function).collect::<Vec<_>>());
        let call = |name: &str, arguments: &str| Function { name: name.into(), arguments: arguments.into() };
        assert_eq!(
            names("\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>"),
            Some(vec![call("f", "{\"x\":1}")])
        );
        assert_eq!(
            names("[{\"name\": \"f\"}, {\"name\": \"g\", \"arguments\": \"{}\"}]"),
            Some(vec![call("f", "{}"), call("g", "{}")])
        );
        assert_eq!(
            names("{\"name\": \"f\"}</tool_call>\n<tool_call>{\"name\": \"g\"}</tool_call>"),
            Some(vec![call("f", "{}"), call("g", "{}")])
        );
        for wrong in ["", "{\"name\": \"f\"", "{\"name\": 3}", "[]", "hello"] {
            assert_eq!(names(wrong), None, "{wrong:?}");
        }
    }
}
