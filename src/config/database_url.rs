//! A database's address, which may hold a password.

use serde::{Deserialize, Serialize, Serializer};
use std::fmt;
use url::Url;

/// What is shown in place of a password.
const MASK: &str = "***";

/// Where a PostgreSQL database is; empty for none. Shown, and written, without its password.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct DatabaseUrl(String);

impl DatabaseUrl {
    /// An address from text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Whether none is set.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// With its password: for the driver alone.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether this may stand in the settings. What is shown in place of a password is none: settings that were printed, and
    /// are used as a file, are refused here rather than by the database.
    pub fn is_allowed(text: &str) -> bool {
        let is_masked =
            |url: &Url| url.password() == Some(MASK) || url.query_pairs().any(|(key, value)| key == "password" && value == MASK);
        text.is_empty() || Url::parse(text).is_ok_and(|url| matches!(url.scheme(), "postgres" | "postgresql") && !is_masked(&url))
    }
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return Ok(());
        }
        let Ok(mut url) = Url::parse(&self.0) else { return f.write_str("(not shown)") };
        // Only an address without a host can't have a password, and then has none.
        if url.password().is_some() && url.set_password(Some(MASK)).is_err() {
            return f.write_str("(not shown)");
        }
        let query: Vec<(String, String)> = url.query_pairs().into_owned().collect();
        if query.iter().any(|(key, _)| key == "password") {
            let shown = query.iter().map(|(key, value)| (key, if key == "password" { MASK } else { value.as_str() }));
            url.query_pairs_mut().clear().extend_pairs(shown);
        }
        write!(f, "{url}")
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

impl Serialize for DatabaseUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_in_place_of_a_password_is_not_taken_for_one() {
        for given in ["postgres://tide:s3cret@db:5433/gate?sslmode=require", "postgresql://db/gate?user=tide&password=s3cret"] {
            assert!(DatabaseUrl::is_allowed(given));
            assert!(!DatabaseUrl::is_allowed(&DatabaseUrl::new(given).to_string()), "{given}");
        }
        assert!(DatabaseUrl::is_allowed("postgres://tide@db/gate") && DatabaseUrl::is_allowed(""));
        assert!(!DatabaseUrl::is_allowed("mysql://tide@db/gate"));
    }

    #[test]
    fn the_password_is_never_shown() {
        for (given, shown) in [
            ("", ""),
            ("postgres://tide@db/gate", "postgres://tide@db/gate"),
            ("postgres://tide:s3cret@db:5433/gate?sslmode=require", "postgres://tide:***@db:5433/gate?sslmode=require"),
            ("postgresql://db/gate?user=tide&password=s3cret", "postgresql://db/gate?user=tide&password=***"),
            ("postgres://tide:s3cret@[bad", "(not shown)"),
        ] {
            let url = DatabaseUrl::new(given);
            assert_eq!(url.to_string(), shown);
            assert_eq!(format!("{url:?}"), format!("{shown:?}"));
            assert_eq!(serde_json::to_value(&url).expect("text"), shown);
            assert_eq!(url.expose(), given);
        }
    }
}
