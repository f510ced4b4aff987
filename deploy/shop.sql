-- The data of the profile `postgres` in compose.yaml: orders, and a user that can only read them.
\getenv password READER_PASSWORD
CREATE ROLE reader LOGIN PASSWORD :'password';
CREATE TABLE orders (id integer PRIMARY KEY, customer text NOT NULL, total double precision NOT NULL);
GRANT SELECT ON orders TO reader;
INSERT INTO orders SELECT n, 'customer ' || n % 100, n * 7 % 1000 / 4.0 FROM generate_series(1, 10000) AS n;
