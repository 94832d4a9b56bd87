//! What the arguments mean, as a whole. Each command tests its own beside it.

use super::*;
use clap::error::ErrorKind;

fn parse(arguments: &[&str]) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(["backbone"].iter().chain(arguments))
}

#[test]
fn the_arguments_do_not_contradict_each_other() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_of_the_contract_is_there() {
    for arguments in [
        &["serve"][..],
        &[
            "client",
            "add",
            "noc-c2",
            "--name",
            "N",
            "--subscribe",
            "a.#",
            "--subscribe",
            "b.*",
            "--webhook",
            "https://x/",
        ],
        &["client", "list"],
        &["client", "show", "noc-c2"],
        &["client", "update", "noc-c2", "--pause"],
        &["client", "remove", "noc-c2", "--yes"],
        &["client", "rotate-secret", "noc-c2"],
        &["client", "test-webhook", "noc-c2"],
        &["send", "a.b", "{}"],
        &["send", "a.b", "-"],
        &["send", "a.b", "@file"],
        &["send", "--ndjson", "@file"],
        &["notify", "hello"],
        &["receive", "--max", "5", "--wait", "3", "--follow"],
        &["dead", "list", "noc-c2"],
        &["dead", "replay", "noc-c2", "--id", "1"],
        &["dead", "purge", "noc-c2"],
        &["trace", "some-id"],
        &["token"],
        &["token-key"],
        &["status"],
        &["listen"],
        &[
            "listen",
            "127.0.0.1:0",
            "--webhook-secret",
            "whsec_x",
            "--status",
            "500",
            "--retry-after",
            "3",
            "--max",
            "1",
        ],
        &["bench", "send", "pipe", "--seconds", "1"],
        &["demo"],
        &["completions", "zsh"],
    ] {
        assert!(parse(arguments).is_ok(), "{arguments:?}");
    }
    assert!(parse(&[]).expect("serve is the default").command.is_none());
}

#[test]
fn common_options_may_stand_anywhere() {
    for arguments in [
        &["--json", "--as", "noc-c2", "--secret", "s", "--url", "http://h:1", "receive"][..],
        &["receive", "--json", "--as", "noc-c2", "--secret", "s", "--url", "http://h:1"],
        &["--json", "receive", "--as", "noc-c2", "--url", "http://h:1", "--secret", "s"],
    ] {
        let globals = parse(arguments).expect("parses").globals;
        assert!(globals.json, "{arguments:?}");
        assert_eq!(globals.client_id.as_deref(), Some("noc-c2"), "{arguments:?}");
        assert_eq!(
            (globals.secret.as_deref(), globals.url.as_deref()),
            (Some("s"), Some("http://h:1")),
            "{arguments:?}"
        );
    }
}

#[test]
fn a_typed_url_is_told_from_one_of_the_environment() {
    for (arguments, typed) in [
        (&["backbone", "bench", "--url", "http://h:1"][..], true),
        (&["backbone", "--url", "http://h:1", "bench"], true),
        (&["backbone", "bench"], false),
    ] {
        let matches = Cli::command().try_get_matches_from(arguments).expect("parses");
        assert_eq!(matches.value_source("url") == Some(ValueSource::CommandLine), typed, "{arguments:?}");
    }
}

#[test]
fn wrong_usage_is_found_before_anything_is_done() {
    for (arguments, kind) in [
        (&["bogus"][..], ErrorKind::InvalidSubcommand),
        (&["client"], ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
        (&["client", "add"], ErrorKind::MissingRequiredArgument),
        (&["receive", "--max", "0"], ErrorKind::ValueValidation),
        (&["receive", "--lease", "3601"], ErrorKind::ValueValidation),
        (&["send", "a", "b", "--batch", "1001"], ErrorKind::ValueValidation),
        (&["client", "update", "x", "--pause", "--resume"], ErrorKind::ArgumentConflict),
        (&["client", "add", "x", "--send-per-s", "many"], ErrorKind::ValueValidation),
        (&["bench", "--seconds", "0"], ErrorKind::ValueValidation),
    ] {
        let error = parse(arguments).expect_err("is wrong");
        assert_eq!(error.kind(), kind, "{arguments:?}");
        assert_eq!(error.exit_code(), 2, "{arguments:?}");
    }
    assert_eq!(parse(&["--help"]).expect_err("shows help").exit_code(), 0);
}

#[test]
fn help_shows_no_secret_of_the_environment() {
    let mut command = Cli::command();
    let help = command.render_long_help().to_string();
    assert!(help.contains("SOAR_CLIENT_SECRET") && !help.contains("SOAR_CLIENT_SECRET="), "{help}");
    assert!(!help.contains("SOAR_ADMIN_TOKEN="), "{help}");
}
