//! `backbone token` and `backbone token-key`.

use clap::Args;
use reqwest::Method;
use serde_json::{Value, json};

use super::api::Call;
use super::context::Context;
use super::error::CliError;
use crate::token::TokenSecret;

/// Get a bearer token that stands for your client id and secret
///
/// Prints the token; when it expires is said on stderr. Send it as `Authorization: Bearer TOKEN`.
#[derive(Debug, Args)]
pub(crate) struct Token {}

impl Token {
    pub(crate) async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let who = context.client()?;
        let answer: Value = context.api()?.fetch(&Call::new(Method::POST, &["token"], &who)).await?;
        if context.out.json {
            return context.out.json_line(&answer);
        }
        let Some(token) = answer["token"].as_str() else {
            return Err(CliError::failed("the router's answer has no token; is SOAR_URL right?"));
        };
        if let Some(expires_at) = answer["expires_at"].as_str() {
            context.out.note(format!("valid until {expires_at}"));
        }
        context.out.line(token)
    }
}

/// Print a fresh key for SOAR_TOKEN_SECRET
///
/// The router makes one by itself at its first start; set one where several routers must take the same tokens.
#[derive(Debug, Args)]
pub(crate) struct TokenKey {}

impl TokenKey {
    pub(crate) fn run(self, context: &mut Context) -> Result<(), CliError> {
        let key = TokenSecret::generate().to_paserk();
        if context.out.json { context.out.json_line(&json!({"key": key})) } else { context.out.line(key) }
    }
}
