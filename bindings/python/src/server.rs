//! The server, with an executor in Python.

use overspill_server::{
    Command, Config, Error, Executor, ModelInfo, Problem, Result, Step, StepOutcome, Token,
};
use pyo3::{
    prelude::*,
    types::{PyBytes, PyDict},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use crate::errors::raise;

/// Serves `model` (JSON) as `config` (JSON) says, until SIGTERM or SIGINT. `executor` has `command(json)`,
/// `step(steps)`, `hidden(key)` and `set_hidden(key, file)`; all are called on this thread, and answer JSON
/// with `ok` or `error`. `ready` is called with the address once it listens.
#[pyfunction]
pub fn serve(
    py: Python<'_>,
    config: &str,
    model: &str,
    executor: Py<PyAny>,
    ready: Py<PyAny>,
) -> PyResult<()> {
    let config: Config = parse(config)?;
    let info: ModelInfo = parse(model)?;
    let tell = |address: std::net::SocketAddr| {
        Python::attach(|py| {
            if let Err(error) = ready.call1(py, (address.to_string(),)) {
                error.print(py);
            }
        });
    };
    let served = py.detach(|| overspill_server::serve(config, info, &mut PyExecutor(executor), tell));
    served.map_err(|error| raise(py, "ServerError", &error, |_| Ok(())))
}

/// `overspill serve`: hands its options to Python.
pub fn serve_command(options: &str) -> std::result::Result<(), String> {
    Python::attach(|py| {
        let served = py.import("overspill.serve").and_then(|module| module.call_method1("main", (options,)));
        served.map(|_| ()).map_err(|error| error.value(py).to_string())
    })
}

fn parse<T: DeserializeOwned>(text: &str) -> PyResult<T> {
    serde_json::from_str(text).map_err(|error| pyo3::exceptions::PyValueError::new_err(error.to_string()))
}

/// The executor on the other side. The GIL is held within its calls and not between them.
struct PyExecutor(Py<PyAny>);

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer<T> {
    Ok(T),
    Error(Problem),
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Token(Token),
    Paused(usize),
    Failed(Problem),
}

impl PyExecutor {
    /// Calls a method and reads what it answers.
    fn call<T: DeserializeOwned>(
        &self,
        call: impl for<'py> FnOnce(&Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>>,
    ) -> Result<T> {
        Python::attach(|py| {
            let failed = |error: PyErr| {
                let message = error.to_string();
                error.print(py);
                Error::Internal { message }
            };
            let text: String = call(self.0.bind(py)).and_then(|answer| answer.extract()).map_err(failed)?;
            match serde_json::from_str(&text) {
                Ok(Answer::Ok(value)) => Ok(value),
                Ok(Answer::Error(problem)) => Err(problem.into()),
                Err(error) => {
                    Err(Error::Internal { message: format!("the executor answered nonsense: {error}") })
                }
            }
        })
    }
}

impl Executor for PyExecutor {
    fn command(&mut self, command: &Command<'_>) -> Result<Value> {
        let text =
            serde_json::to_string(command).map_err(|error| Error::Internal { message: error.to_string() })?;
        self.call(|executor| executor.call_method1("command", (text,)))
    }

    fn step(&mut self, steps: &[Step]) -> Result<Vec<StepOutcome>> {
        let outcomes: Vec<Outcome> = self.call(|executor| executor.call_method1("step", (steps,)))?;
        let outcome = |outcome| match outcome {
            Outcome::Token(token) => StepOutcome::Token(token),
            Outcome::Paused(layer) => StepOutcome::Paused(layer),
            Outcome::Failed(problem) => StepOutcome::Failed(problem.into()),
        };
        Ok(outcomes.into_iter().map(outcome).collect())
    }

    fn hidden(&mut self, key: u64) -> Result<Vec<u8>> {
        // Bytes are no JSON: they are written into what is handed over.
        let file = Python::attach(|py| PyDict::new(py).unbind());
        let _: Value = self.call(|executor| {
            let file = file.bind(executor.py());
            executor.call_method1("hidden", (key, file))
        })?;
        Python::attach(|py| {
            let found = file.bind(py).get_item("file").ok().flatten();
            let bytes = found.and_then(|found| found.extract::<Vec<u8>>().ok());
            bytes.ok_or_else(|| Error::Internal { message: "the executor gave no file".to_owned() })
        })
    }

    fn set_hidden(&mut self, key: u64, file: &[u8]) -> Result<()> {
        let _: Value = self.call(|executor| {
            let file = PyBytes::new(executor.py(), file);
            executor.call_method1("set_hidden", (key, file))
        })?;
        Ok(())
    }
}
