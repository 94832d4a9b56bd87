//! `TestApp`: a router on a broker, its administrator, and the clients that a test onboards.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::fixture::{BrokerKind, Fixture, Provision};
use super::http::{Api, Call, Client};
use super::process::RouterProcess;
use super::wait::{SOON, eventually};

/// How long a router may take to stop. Debug builds on a busy machine are slow; `SOAR_SHUTDOWN_TIMEOUT` is below it.
const SHUTDOWN: Duration = Duration::from_secs(30);

/// A router on a broker.
pub(crate) struct TestApp {
    pub(crate) router: RouterProcess,
    pub(crate) api: Api,
    admin_token: String,
    /// What must be in no log (promise 9).
    secrets: Vec<String>,
    /// The broker's node, when it has one; and the directory.
    _provision: Provision,
    directory: TempDir,
}

impl Fixture for TestApp {
    async fn start(kind: BrokerKind) -> Self {
        Self::start_with(kind, &[]).await
    }

    /// Sees that nothing is under way any more, that it stops when asked, and that its log is clean.
    async fn finish(mut self) {
        if !self.router.is_running() {
            return self.check_log();
        }
        self.settle_down().await;
        self.router.terminate();
        let status = self.router.wait_for_exit(SHUTDOWN).await;
        assert!(status.success(), "SIGTERM ends it well: {status}");
        self.check_log();
    }
}

impl TestApp {
    /// Starts it with these variables besides the usual ones.
    pub(crate) async fn start_with(kind: BrokerKind, env: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let data_dir = directory.path().join("data");
        std::fs::create_dir(&data_dir).expect("a data directory");
        Self::start_at(kind, directory, &data_dir, env).await
    }

    /// The same on a given data directory; `directory` is only kept.
    pub(crate) async fn start_at(
        kind: BrokerKind,
        directory: TempDir,
        data_dir: &std::path::Path,
        env: &[(&str, &str)],
    ) -> Self {
        Self::start_provisioned(kind.provision().await, directory, data_dir, env).await
    }

    /// The same on a broker that is there already.
    pub(crate) async fn start_provisioned(
        provision: Provision,
        directory: TempDir,
        data_dir: &std::path::Path,
        env: &[(&str, &str)],
    ) -> Self {
        let mut app = Self::prepare(provision, directory, data_dir, env).await;
        app.router.wait_until_ready().await;
        app
    }

    /// Starts one on the RabbitMQ at `url`, which the test looks after, and waits until it is ready.
    pub(crate) async fn start_on(kind: BrokerKind, url: String, env: &[(&str, &str)]) -> Self {
        let mut app = Self::start_away_from(kind, url, env).await;
        app.router.wait_until_ready().await;
        app
    }

    /// The same for a RabbitMQ that may not be there: waits until the router answers.
    pub(crate) async fn start_away_from(kind: BrokerKind, url: String, env: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let data_dir = directory.path().join("data");
        std::fs::create_dir(&data_dir).expect("a data directory");
        let provision = Provision { router_env: kind.router_env(url), _keep: None };
        Self::prepare(provision, directory, &data_dir, env).await
    }

    /// Starts it and waits until it answers.
    async fn prepare(
        provision: Provision,
        directory: TempDir,
        data_dir: &std::path::Path,
        env: &[(&str, &str)],
    ) -> Self {
        let usual = [
            ("SOAR_SHUTDOWN_TIMEOUT", "15"),
            // Endpoints of the tests.
            ("SOAR_WEBHOOK_ALLOW", "127.0.0.0/8"),
            ("RUST_LOG", "info"),
        ];
        let mut variables: BTreeMap<String, String> = provision.router_env.clone().into_iter().collect();
        variables.extend(usual.iter().chain(env).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let mut router = RouterProcess::prepare(data_dir, variables);
        router.spawn();
        router.wait_until_alive().await;
        let admin_token = router.admin_token();
        let api = Api::new(router.address());
        let secrets = vec![admin_token.clone()];
        Self { router, api, admin_token, secrets, _provision: provision, directory }
    }

    /// The directory that the data directory is in.
    pub(crate) fn directory(&self) -> &std::path::Path {
        self.directory.path()
    }

    /// The administrator's token.
    pub(crate) fn admin_token(&self) -> &str {
        &self.admin_token
    }

    /// A call with the administrator's token.
    pub(crate) fn admin(&self, method: Method, path: &str) -> Call {
        self.api.call(method, path).bearer(&self.admin_token)
    }

    /// Onboards a client with these subscriptions.
    pub(crate) async fn onboard(&mut self, id: &str, subscriptions: &[&str]) -> Client {
        self.onboard_with(json!({"client_id": id, "subscriptions": subscriptions})).await
    }

    /// Onboards a client with this body of `POST /clients`.
    pub(crate) async fn onboard_with(&mut self, body: Value) -> Client {
        let created = self.admin(Method::POST, "/clients").json(&body).send().await.ok(201);
        let id = created["client_id"].as_str().expect("an id").to_owned();
        let secret = created["secret"].as_str().expect("a secret").to_owned();
        self.note_secret(&secret);
        if let Some(webhook_secret) = created["webhook_secret"].as_str() {
            self.note_secret(webhook_secret);
        }
        Client { api: self.api.clone(), id, secret }
    }

    /// Changes a client and returns its record.
    pub(crate) async fn patch(&self, id: &str, patch: Value) -> Value {
        let call = self.admin(Method::PATCH, &format!("/clients/{id}"));
        call.body("application/merge-patch+json", patch.to_string()).send().await.ok(200)
    }

    /// Deletes a client.
    pub(crate) async fn delete(&self, id: &str) {
        let answer = self.admin(Method::DELETE, &format!("/clients/{id}")).send().await;
        assert_eq!(answer.status, 204, "{answer:?}");
    }

    /// Something that must be in no log.
    pub(crate) fn note_secret(&mut self, secret: &str) {
        self.secrets.push(secret.to_owned());
    }

    /// A counter or gauge of `/metrics`, summed over its labels.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let answer = self.admin(Method::GET, "/metrics").send().await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let text = String::from_utf8(answer.body.to_vec()).expect("metrics are text");
        let samples = text
            .lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ') || rest.starts_with('{')));
        samples.map(|line| line.rsplit(' ').next().and_then(|v| v.parse::<f64>().ok()).expect("a sample")).sum()
    }

    /// Stops it with SIGTERM and starts it again on what it left.
    pub(crate) async fn restart(&mut self) {
        self.router.terminate();
        let status = self.router.wait_for_exit(SHUTDOWN).await;
        assert!(status.success(), "SIGTERM ends it well: {status}");
        self.router.restart().await;
    }

    /// Kills it with SIGKILL and starts it again on what it left.
    pub(crate) async fn kill_and_restart(&mut self) {
        self.router.kill();
        self.router.restart().await;
    }

    /// All clients' ids.
    pub(crate) async fn client_ids(&self) -> Vec<String> {
        let (mut ids, mut after) = (Vec::new(), String::new());
        loop {
            let page = self.admin(Method::GET, &format!("/clients?limit=1000{after}")).send().await.ok(200);
            let clients = page["clients"].as_array().expect("clients");
            ids.extend(clients.iter().map(|client| client["client_id"].as_str().expect("an id").to_owned()));
            match page["next"].as_str() {
                Some(next) => after = format!("&after={next}"),
                None => return ids,
            }
        }
    }

    /// Waits until whatever clients sent has gone on its way.
    async fn settle_down(&self) {
        for id in self.client_ids().await {
            eventually(&format!("what {id} sent is forwarded"), SOON, async || {
                let record = self.admin(Method::GET, &format!("/clients/{id}")).send().await.ok(200);
                let queues = &record["queues"];
                (record["paused"] == true || (queues["outbox"] == 0 && queues["notify"] == 0)).then_some(())
            })
            .await;
        }
    }

    fn check_log(&self) {
        let log = self.router.log();
        assert!(!log.contains("panicked at"), "something panicked:\n{log}");
        for secret in &self.secrets {
            assert!(!log.contains(secret), "a secret is in the log");
        }
    }
}
