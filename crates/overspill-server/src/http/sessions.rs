//! The routes of sessions.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Path, State, rejection::PathRejection},
    http::HeaderMap,
    response::Response,
};
use serde_json::Value;

use super::{
    App, Caller,
    body::{self, Members},
};
use crate::{
    Error, Result,
    control::{Act, Answer, Deed, Steer},
    keys::Owner,
    request::{Fields, session_name},
};

/// The session in a path.
pub type Name = Path<String>;
type App_ = State<Arc<App>>;

const FILE: &str = "application/octet-stream";
/// A day.
const MAX_ETA_MS: f64 = 86_400_000.0;
const MAX_STRENGTH: f64 = 1e6;

/// `GET /v1/sessions`
pub async fn list(State(app): App_, Caller(owner): Caller) -> Result<Response> {
    ask(&app, owner, Act::List).await
}

/// `POST /v1/sessions`
pub async fn create(
    State(app): App_,
    Caller(owner): Caller,
    Members(mut fields): Members,
) -> Result<Response> {
    let (name, exact) = (new_name(&mut fields)?, fields.flag("exact")?);
    ask(&app, owner, Act::Create { name, exact }).await
}

/// `GET /v1/sessions/{id}`
pub async fn get(State(app): App_, Caller(owner): Caller, name: NameOrNot) -> Result<Response> {
    one(&app, owner, name, Deed::Get).await
}

/// `DELETE /v1/sessions/{id}`
pub async fn delete(State(app): App_, Caller(owner): Caller, name: NameOrNot) -> Result<Response> {
    one(&app, owner, name, Deed::Delete).await
}

/// `POST /v1/sessions/{id}/pause`
pub async fn pause(
    State(app): App_,
    Caller(owner): Caller,
    name: NameOrNot,
    Members(mut fields): Members,
) -> Result<Response> {
    let layer = fields.count("layer", 0..=u64::from(u32::MAX))?.map(|layer| layer as usize);
    one(&app, owner, name, Deed::Pause { layer }).await
}

/// `POST /v1/sessions/{id}/fork`
pub async fn fork(
    State(app): App_,
    Caller(owner): Caller,
    name: NameOrNot,
    Members(mut fields): Members,
) -> Result<Response> {
    let child = new_name(&mut fields)?;
    one(&app, owner, name, Deed::Fork { name: child }).await
}

/// `POST /v1/sessions/{id}/io_wait`
pub async fn io_wait(
    State(app): App_,
    Caller(owner): Caller,
    name: NameOrNot,
    Members(mut fields): Members,
) -> Result<Response> {
    let eta_ms = fields.number("eta_ms", 0.0..=MAX_ETA_MS)?;
    let eta_ms = eta_ms.ok_or_else(|| Error::invalid("eta_ms", "eta_ms is needed"))?;
    one(&app, owner, name, Deed::IoWait { eta_ms }).await
}

/// `POST /v1/sessions/{id}/steer`
pub async fn steer(
    State(app): App_,
    Caller(owner): Caller,
    name: NameOrNot,
    Members(mut fields): Members,
) -> Result<Response> {
    let steer = steering(&mut fields)?;
    one(&app, owner, name, Deed::Steer(steer)).await
}

/// `POST /v1/sessions/{id}/save`
pub async fn save(State(app): App_, Caller(owner): Caller, name: NameOrNot) -> Result<Response> {
    one(&app, owner, name, Deed::Save).await
}

/// `GET /v1/sessions/{id}/hidden`
pub async fn hidden(State(app): App_, Caller(owner): Caller, name: NameOrNot) -> Result<Response> {
    one(&app, owner, name, Deed::Hidden).await
}

/// `PUT /v1/sessions/{id}/hidden`
pub async fn set_hidden(
    State(app): App_,
    Caller(owner): Caller,
    name: NameOrNot,
    headers: HeaderMap,
    body: Body,
) -> Result<Response> {
    body::expect_type(&headers, FILE)?;
    let file = body::read(&app, body, app.limits.hidden_bytes).await?;
    one(&app, owner, name, Deed::SetHidden(file.to_vec())).await
}

/// A path whose name is not text names nothing.
type NameOrNot = std::result::Result<Name, PathRejection>;

async fn one(app: &App, owner: Owner, name: NameOrNot, deed: Deed) -> Result<Response> {
    let Path(name) = name.map_err(|_| Error::NoRoute)?;
    ask(app, owner, Act::One(name, deed)).await
}

async fn ask(app: &App, owner: Owner, act: Act) -> Result<Response> {
    Ok(match app.control(owner, act).await? {
        Answer::Json(value) => body::json(&value),
        Answer::File(file) => body::typed(FILE, file),
    })
}

fn new_name(fields: &mut Fields) -> Result<Option<String>> {
    fields.text("id")?.map(|name| session_name(name, "id")).transpose()
}

fn steering(fields: &mut Fields) -> Result<Steer> {
    let layer = fields.count("layer", 0..=u64::from(u32::MAX))?;
    let layer = layer.ok_or_else(|| Error::invalid("layer", "layer is needed"))? as usize;
    let vector = match fields.take("vector") {
        None => None,
        Some(Value::Array(list)) => {
            let numbers: Option<Vec<f32>> = list.iter().map(|one| Some(one.as_f64()? as f32)).collect();
            let numbers = numbers.filter(|numbers| numbers.iter().all(|number| number.is_finite()));
            Some(numbers.ok_or_else(|| Error::invalid("vector", "vector has to be of finite numbers"))?)
        }
        Some(_) => return Err(Error::invalid("vector", "vector has to be a list of numbers")),
    };
    Ok(Steer {
        layer,
        name: fields.text("name")?.unwrap_or_else(|| "steer".to_owned()),
        vector,
        toward: fields.text("toward")?,
        away: fields.text("away")?,
        strength: fields.number("strength", -MAX_STRENGTH..=MAX_STRENGTH)?.unwrap_or(1.0),
    })
}
