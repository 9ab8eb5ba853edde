//! What a token looks like: `tgd_ID_SECRET`.
//!
//! The prefix tells people, and programs that look for leaked secrets, what it is. The id finds what is known of it, without
//! anything being looked up by a secret. The secret has 256 random bits: a plain hash of it is as good as a slow one.

use crate::store::CredentialKind;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::{
    digest::{SHA256, SHA256_OUTPUT_LEN, digest},
    rand::{SecureRandom, SystemRandom},
};
use subtle::ConstantTimeEq;

const SECRET_BYTES: usize = 32;
const SECRET_CHARS: usize = 43;
const ID_BYTES: usize = 10;
const ID_CHARS: usize = 16;
/// Without what can be taken for another character: ids are read aloud.
const ID_ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";

/// The SHA-256 of a secret.
pub type SecretHash = [u8; SHA256_OUTPUT_LEN];

fn prefix(kind: CredentialKind) -> &'static str {
    match kind {
        CredentialKind::Device => "tgd",
        CredentialKind::Operator => "tgo",
        CredentialKind::Enrolment => "tge",
    }
}

/// A token that was just made.
pub struct NewToken {
    /// Its id.
    pub id: String,
    /// All of it: to be shown once.
    pub text: String,
    /// The hash of its secret: to be kept.
    pub hash: SecretHash,
}

impl NewToken {
    /// Makes one.
    pub fn generate(kind: CredentialKind) -> Self {
        let (mut id, mut secret) = ([0; ID_BYTES], [0; SECRET_BYTES]);
        let random = SystemRandom::new();
        random.fill(&mut id).and_then(|()| random.fill(&mut secret)).expect("the operating system has random numbers");
        let bits = id.iter().fold(0_u128, |bits, byte| bits << 8 | u128::from(*byte));
        let id: String = (0..ID_CHARS).map(|index| char::from(ID_ALPHABET[(bits >> (5 * index)) as usize & 31])).collect();
        let secret = URL_SAFE_NO_PAD.encode(secret);
        Self { text: format!("{}_{id}_{secret}", prefix(kind)), hash: hash(&secret), id }
    }
}

/// A token as a caller shows it.
#[derive(Debug, PartialEq, Eq)]
pub struct Presented<'a> {
    /// What it says it is for.
    pub kind: CredentialKind,
    /// Its id.
    pub id: &'a str,
    /// The hash of its secret.
    pub hash: SecretHash,
}

impl<'a> Presented<'a> {
    /// Reads a token; `None` for what can't be one.
    pub fn parse(text: &'a str) -> Option<Self> {
        let (first, rest) = text.split_once('_')?;
        let (id, secret) = rest.split_once('_')?;
        let kinds = [CredentialKind::Device, CredentialKind::Operator, CredentialKind::Enrolment];
        let kind = kinds.into_iter().find(|kind| prefix(*kind) == first)?;
        let sound = id.len() == ID_CHARS && id.bytes().all(|byte| ID_ALPHABET.contains(&byte)) && secret.len() == SECRET_CHARS;
        sound.then(|| Self { kind, id, hash: hash(secret) })
    }

    /// Whether it is the one that is known.
    pub fn is(&self, kind: CredentialKind, known: &[u8]) -> bool {
        self.kind == kind && bool::from(self.hash.as_slice().ct_eq(known))
    }
}

fn hash(secret: &str) -> SecretHash {
    let mut hash = [0; SHA256_OUTPUT_LEN];
    hash.copy_from_slice(digest(&SHA256, secret.as_bytes()).as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_known_by_its_hash_and_by_nothing_less() {
        let token = NewToken::generate(CredentialKind::Device);
        let presented = Presented::parse(&token.text).expect("it is one");
        assert_eq!((presented.kind, presented.id), (CredentialKind::Device, token.id.as_str()));
        assert!(presented.is(CredentialKind::Device, &token.hash));
        assert!(!presented.is(CredentialKind::Operator, &token.hash), "of another kind");
        assert!(!presented.is(CredentialKind::Device, &NewToken::generate(CredentialKind::Device).hash), "another secret");
        assert!(!presented.is(CredentialKind::Device, &token.hash[..31]) && !presented.is(CredentialKind::Device, &[]));
    }

    #[test]
    fn no_two_are_alike_and_the_secret_is_not_in_the_hash_or_the_id() {
        let tokens: Vec<NewToken> = (0..100).map(|_| NewToken::generate(CredentialKind::Operator)).collect();
        let ids: std::collections::HashSet<_> = tokens.iter().map(|token| &token.id).collect();
        assert_eq!(ids.len(), tokens.len());
    }

    #[test]
    fn what_is_not_a_token_is_not_taken_for_one() {
        let good = NewToken::generate(CredentialKind::Enrolment).text;
        for bad in ["", "tgd", "tgd__", "Bearer x", &good[1..], &good[..good.len() - 1], &format!("{good}x"), &good.replace("tge", "tgx")] {
            assert_eq!(Presented::parse(bad), None, "{bad}");
        }
    }
}
