//! Secrets: made, hashed, compared, and kept in files that only the owner reads (promise 9).
//!
//! A client's own secret is shown once, and only its hash is kept. A webhook secret signs, so it must be kept itself;
//! the store encrypts it.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::time::Timestamp;

/// A secret of 256 random bits, for the one answer that shows it. Not `Display`, and `Debug` hides it.
pub struct Secret(String);

impl Secret {
    /// A fresh one: 43 characters of URL-safe base64.
    pub fn generate() -> Self {
        use base64::Engine as _;
        let bytes: [u8; 32] = rand::random();
        Self(base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes))
    }

    /// The secret itself, to be shown once.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// SHA-256 of a secret. Enough for 256 random bits: there is nothing to guess, so nothing to slow down.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretHash([u8; 32]);

impl SecretHash {
    /// Hashes a secret.
    pub fn of(secret: &str) -> Self {
        Self(Sha256::digest(secret.as_bytes()).into())
    }

    /// A hash that no known secret has: compared against when the client does not exist, so that the answer takes the
    /// same time.
    pub const fn nobody() -> Self {
        Self([0; 32])
    }

    /// Whether both are hashes of one secret; compared in constant time.
    pub fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl std::fmt::Debug for SecretHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SecretHash(…)")
    }
}

/// A secret as a broker with users of its own keeps it: four bytes of salt, and SHA-256 of salt and secret. That is what
/// RabbitMQ takes for a password (<https://www.rabbitmq.com/docs/passwords>). Kept for every client, so that it can be
/// given a user at a broker that comes later, or that has lost its users, although nobody knows the secret any more.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaltedHash {
    salt: [u8; 4],
    hash: [u8; 32],
}

impl SaltedHash {
    /// Hashes a secret with a fresh salt.
    pub fn of(secret: &str) -> Self {
        let salt: [u8; 4] = rand::random();
        let mut digest = Sha256::new();
        digest.update(salt);
        digest.update(secret);
        Self { salt, hash: digest.finalize().into() }
    }

    /// Salt and hash, one behind the other, in base64.
    pub fn to_base64(self) -> String {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.encode([&self.salt[..], &self.hash].concat())
    }
}

impl std::fmt::Debug for SaltedHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SaltedHash(…)")
    }
}

/// Secrets before the previous one that may still be valid; a rotation beyond that ends the oldest early.
const EARLIER_MAX: usize = 7;

/// What was valid before a rotation and stays so beyond it, newest first: each until the time that it was promised. A
/// rotation without an overlap, which is how a leaked secret is ended, ends all.
fn still_valid<T: Clone>(
    previous: Option<&(T, i64)>,
    earlier: &[(T, i64)],
    now: Timestamp,
    previous_valid_until: Timestamp,
) -> Vec<(T, i64)> {
    if previous_valid_until <= now {
        return Vec::new();
    }
    let is_valid = |(_, until): &&(T, i64)| now.as_millis() < *until;
    previous.into_iter().chain(earlier).filter(is_valid).take(EARLIER_MAX).cloned().collect()
}

/// The secrets that are valid: the current one and, during a rotation's overlap, those before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretSlots {
    /// The newest.
    pub current: SecretHash,
    /// The one before, and until when in milliseconds since the epoch.
    pub previous: Option<(SecretHash, i64)>,
    /// Those before that, whose overlap had not ended when there was another rotation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<(SecretHash, i64)>,
    /// The newest, for a broker with users of its own. `None` for a client that an earlier version made, until its next
    /// rotation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broker_password: Option<SaltedHash>,
}

impl SecretSlots {
    /// Slots with one secret.
    pub fn new(secret: &Secret) -> Self {
        Self {
            current: SecretHash::of(secret.reveal()),
            previous: None,
            earlier: Vec::new(),
            broker_password: Some(SaltedHash::of(secret.reveal())),
        }
    }

    /// Slots for a client that does not exist: [`SecretSlots::verify`] refuses everything in the same time.
    pub const fn nobody() -> Self {
        Self { current: SecretHash::nobody(), previous: None, earlier: Vec::new(), broker_password: None }
    }

    /// A new current secret; the one before stays valid until `previous_valid_until`, and what is still valid of those
    /// before as long as it was promised, unless there is no overlap.
    #[must_use]
    pub fn rotated(&self, secret: &Secret, now: Timestamp, previous_valid_until: Timestamp) -> Self {
        Self {
            current: SecretHash::of(secret.reveal()),
            previous: Some((self.current, previous_valid_until.as_millis())),
            earlier: still_valid(self.previous.as_ref(), &self.earlier, now, previous_valid_until),
            broker_password: Some(SaltedHash::of(secret.reveal())),
        }
    }

    /// Whether `secret` is valid at `now`. Compares with as many as there may be in any case, each in constant time.
    pub fn verify(&self, secret: &str, now: Timestamp) -> bool {
        let hash = SecretHash::of(secret);
        let nobody = (SecretHash::nobody(), i64::MIN);
        let earlier = (0..EARLIER_MAX).map(|n| self.earlier.get(n).copied());
        let before = std::iter::once(self.previous).chain(earlier).map(|slot| slot.unwrap_or(nobody));
        let fits = |(slot, until): (SecretHash, i64)| slot.matches(&hash) & (now.as_millis() < until);
        before.fold(self.current.matches(&hash), |fitted, slot| fitted | fits(slot))
    }
}

/// First characters of a webhook secret (Standard Webhooks).
const WEBHOOK_SECRET_PREFIX: &str = "whsec_";

/// The secrets that sign a client's webhooks: the current one and, during a rotation's overlap, those before. Each is
/// `whsec_` and base64 of 32 random bytes.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WebhookSecrets {
    current: String,
    /// The one before, and until when in milliseconds since the epoch.
    previous: Option<(String, i64)>,
    /// Those before that, whose overlap had not ended when there was another rotation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    earlier: Vec<(String, i64)>,
}

impl WebhookSecrets {
    /// Fresh ones.
    pub fn generate() -> Self {
        Self { current: generate_webhook_secret(), previous: None, earlier: Vec::new() }
    }

    /// The current secret, to be shown once.
    pub fn current(&self) -> &str {
        &self.current
    }

    /// A new current secret; the one before signs as well until `previous_valid_until`, and what still signs of those
    /// before as long as it was promised, unless there is no overlap.
    #[must_use]
    pub fn rotated(&self, now: Timestamp, previous_valid_until: Timestamp) -> Self {
        Self {
            current: generate_webhook_secret(),
            previous: Some((self.current.clone(), previous_valid_until.as_millis())),
            earlier: still_valid(self.previous.as_ref(), &self.earlier, now, previous_valid_until),
        }
    }

    /// The secrets that sign at `now`, newest first.
    pub fn valid_at(&self, now: Timestamp) -> impl Iterator<Item = &str> {
        let before = self.previous.iter().chain(&self.earlier).filter(move |(_, until)| now.as_millis() < *until);
        std::iter::once(self.current.as_str()).chain(before.map(|(secret, _)| secret.as_str()))
    }
}

impl std::fmt::Debug for WebhookSecrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WebhookSecrets(…)")
    }
}

fn generate_webhook_secret() -> String {
    use base64::Engine as _;
    let bytes: [u8; 32] = rand::random();
    format!("{WEBHOOK_SECRET_PREFIX}{}", base64::engine::general_purpose::STANDARD.encode(bytes))
}

/// Reads the secret in the file at `path`; makes one with `generate` and puts it there when there is no such file. Only
/// the owner can read the file, from its first byte on; a file that others could read is taken from them, with a
/// warning in the log.
///
/// # Errors
/// When the file can be neither read nor made, or is empty.
pub fn read_or_create(path: &Path, generate: impl FnOnce() -> String) -> std::io::Result<String> {
    match std::fs::File::open(path) {
        Ok(mut file) => {
            let mode = file.metadata()?.permissions().mode();
            if mode & 0o077 != 0 {
                log::warn!("{} could be read by others (mode {:o}): now it cannot", path.display(), mode & 0o777);
                file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
            }
            let mut text = String::new();
            std::io::Read::take(&mut file, 4096).read_to_string(&mut text)?;
            match text.trim() {
                "" => Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "the file is empty")),
                secret => Ok(secret.to_owned()),
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let secret = generate();
            create(path, &secret)?;
            Ok(secret)
        }
        Err(error) => Err(error),
    }
}

/// Written beside and renamed, so that a crash leaves either no file or a whole one.
fn create(path: &Path, secret: &str) -> std::io::Result<()> {
    let beside = path.with_extension("new");
    match std::fs::remove_file(&beside) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // O_EXCL: nobody can have put a file or a link there for us to write into.
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    file.write_all(secret.as_bytes())?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn previous_secret_is_valid_until_its_time() {
        let (old, new) = (Secret::generate(), Secret::generate());
        let slots = SecretSlots::new(&old).rotated(&new, Timestamp::from_millis(0), Timestamp::from_millis(1000));
        assert!(slots.verify(new.reveal(), Timestamp::from_millis(5000)));
        assert!(slots.verify(old.reveal(), Timestamp::from_millis(999)));
        assert!(!slots.verify(old.reveal(), Timestamp::from_millis(1000)));
        assert!(!slots.verify("", Timestamp::from_millis(0)));
        assert!(!SecretSlots::nobody().verify("", Timestamp::from_millis(0)));
    }

    #[test]
    fn another_rotation_keeps_what_the_one_before_promised() {
        let [first, second, third, fourth] = std::array::from_fn(|_| Secret::generate());
        let at = Timestamp::from_millis;
        let once = SecretSlots::new(&first).rotated(&second, at(0), at(1000));
        let twice = once.rotated(&third, at(10), at(500));
        let valid = |slots: &SecretSlots, now| {
            [&first, &second, &third, &fourth].map(|secret| slots.verify(secret.reveal(), at(now)))
        };
        assert_eq!(valid(&twice, 499), [true, true, true, false]);
        assert_eq!(valid(&twice, 500), [true, false, true, false]);
        assert_eq!(valid(&twice, 1000), [false, false, true, false]);
        // Without an overlap all that was before has ended.
        assert_eq!(valid(&twice.rotated(&fourth, at(20), at(20)), 20), [false, false, false, true]);
        // What has ended is not kept.
        assert!(twice.rotated(&fourth, at(2000), at(3000)).earlier.is_empty());
        let json = serde_json::to_value(&twice).expect("serialises");
        assert_eq!(serde_json::from_value::<SecretSlots>(json).expect("reads"), twice);
    }

    #[test]
    fn rotations_without_end_keep_a_few_secrets() {
        let mut secrets = WebhookSecrets::generate();
        for n in 0..20 {
            secrets = secrets.rotated(Timestamp::from_millis(n), Timestamp::from_millis(1000));
        }
        assert_eq!(secrets.valid_at(Timestamp::from_millis(20)).count(), 2 + EARLIER_MAX);
    }

    #[test]
    fn a_salted_hash_is_checked_as_rabbitmq_does() {
        use base64::Engine as _;
        let (one, two) = (SaltedHash::of("secret"), SaltedHash::of("secret"));
        assert_ne!(one.to_base64(), two.to_base64());
        let bytes = base64::engine::general_purpose::STANDARD.decode(one.to_base64()).expect("base64");
        let mut digest = Sha256::new();
        digest.update(&bytes[..4]);
        digest.update("secret");
        assert_eq!(bytes[4..], digest.finalize()[..]);
    }

    #[test]
    fn slots_of_an_earlier_version_are_read() {
        let slots = SecretSlots::new(&Secret::generate());
        let mut json = serde_json::to_value(&slots).expect("serialises");
        assert_eq!(serde_json::from_value::<SecretSlots>(json.clone()).expect("reads"), slots);
        json.as_object_mut().expect("an object").remove("broker_password");
        let earlier: SecretSlots = serde_json::from_value(json).expect("reads");
        assert_eq!(earlier, SecretSlots { broker_password: None, ..slots });
    }

    #[test]
    fn debug_hides_secrets() {
        let secret = Secret::generate();
        let shown = format!("{secret:?} {:?}", SecretSlots::new(&secret));
        assert!(!shown.contains(secret.reveal()));
    }

    #[test]
    fn both_webhook_secrets_sign_during_the_overlap() {
        let old = WebhookSecrets::generate();
        let new = old.rotated(Timestamp::from_millis(0), Timestamp::from_millis(1000));
        assert!(new.current().starts_with("whsec_") && new.current().len() == 6 + 44, "{}", new.current());
        let at = |millis| new.valid_at(Timestamp::from_millis(millis)).collect::<Vec<_>>();
        assert_eq!(at(999), [new.current(), old.current()]);
        assert_eq!(at(1000), [new.current()]);
        assert!(!format!("{new:?}").contains(new.current()));
    }

    #[test]
    fn a_secret_file_is_made_once_and_only_the_owner_reads_it() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("admin-token");
        assert_eq!(read_or_create(&path, || "first".into()).expect("makes it"), "first");
        assert_eq!(read_or_create(&path, || "second".into()).expect("reads it"), "first");
        let mode = || std::fs::metadata(&path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(), 0o600);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("is ours");
        assert_eq!(read_or_create(&path, || "third".into()).expect("reads it"), "first");
        assert_eq!(mode(), 0o600);
        std::fs::write(&path, " \n").expect("writes");
        assert!(read_or_create(&path, || "fourth".into()).is_err());
        assert_eq!(std::fs::read_dir(directory.path()).expect("lists").count(), 1);
    }
}
