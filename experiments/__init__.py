"""The paper's claims and the code's speed, measured. Nothing outside this folder imports it."""
