-- Who may look and not touch: dashboards. Run once, when the database is made.
\set password `cat /run/secrets/grafana/password`
CREATE ROLE grafana LOGIN PASSWORD :'password';
GRANT pg_read_all_data TO grafana;
ALTER ROLE grafana SET default_transaction_read_only = on;
