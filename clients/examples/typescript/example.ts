/**
 * Makes one call, and prints what a platform would log and answer.
 *
 *     node dist/example.js TARGET RUNTIME MODEL [NAME ...]
 *
 * Each NAME is a credential's, and its value is read from the environment. Exits 0 if the workspace may start.
 */
import { Checkpoint, Gate, Scope, Secret, logFields } from "./gate.js";

const [target = "", runtime = "", model = "", ...names] = process.argv.slice(2);
const credentials = names.flatMap((envName) => {
  const value = process.env[envName];
  return value === undefined ? [] : [{ envName, scope: Scope.SCOPE_WORKSPACE, value: new Secret(value) }];
});
const gate = new Gate(target);
const answer = await gate.decide({ runtime, model, credentials }, Checkpoint.CHECKPOINT_CREATE);
gate.close();
console.log(JSON.stringify(logFields(answer)));
if (answer.outcome !== "allowed") {
  console.log(`HTTP ${answer.httpStatus} ${JSON.stringify(answer.httpHeaders)}\n${answer.message}`);
  process.exitCode = 1;
}
// Only here a platform writes the workspace's row, with answer.billingMode.
