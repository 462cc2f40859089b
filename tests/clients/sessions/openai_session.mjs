// A session of OpenAI's Node client: node openai_session.mjs BASE_URL MODEL. CLIENTS_NODE has its node_modules.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const { OpenAI } = createRequire(`${process.env.CLIENTS_NODE}/`)("openai");
const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const report = (step, seen) => console.log(JSON.stringify({ step, seen }));

const models = [];
for await (const found of client.models.list()) models.push(found.id);
assert.deepEqual(models, [model]);
report("models", models);

const chat = await client.chat.completions.create({ model, messages, max_completion_tokens: 8, temperature: 0 });
assert.equal(chat.model, model);
assert.equal(chat.choices[0].message.role, "assistant");
assert.ok(chat.choices[0].message.content.length > 0);
assert.ok(chat.usage.completion_tokens <= 8);
report("chat", chat.choices[0].message.content);

const options = { model, messages, max_completion_tokens: 8, temperature: 0, stream: true };
let text = "";
let usage = null;
for await (const chunk of await client.chat.completions.create({ ...options, stream_options: { include_usage: true } })) {
  text += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, chat.choices[0].message.content);
assert.deepEqual(usage.completion_tokens, chat.usage.completion_tokens);
report("stream", text);

const runner = client.chat.completions.stream({ ...options });
const snapshots = [];
runner.on("content", (_, snapshot) => snapshots.push(snapshot));
assert.equal((await runner.finalChatCompletion()).choices[0].message.content, text);
assert.equal(snapshots.at(-1), text);
report("stream helper", snapshots.length);

const left = await client.chat.completions.create({ ...options, max_completion_tokens: 2000, ignore_eos: true });
for await (const _ of left) break;
report("leave", true);

const closedObject = (properties) => (
  { type: "object", properties, required: Object.keys(properties), additionalProperties: false }
);
const oneOf = (...values) => ({ type: "string", enum: values });
const parameters = closedObject({ city: oneOf("Paris", "Rome"), unit: oneOf("C", "F") });
const tool = { type: "function", function: { name: "get_weather", description: "The weather in a city", parameters } };
const checkCall = (call) => {
  assert.equal(call.type, "function");
  assert.equal(call.function.name, "get_weather");
  const given = JSON.parse(call.function.arguments);
  assert.deepEqual(Object.keys(given).sort(), ["city", "unit"]);
  assert.ok(["Paris", "Rome"].includes(given.city));
  return given;
};
const forced = { model, messages, tools: [tool], max_completion_tokens: 64, temperature: 0 };
const tool_choice = { type: "function", function: { name: "get_weather" } };
const called = await client.chat.completions.create({ ...forced, tool_choice });
assert.equal(called.choices[0].message.tool_calls.length, 1);
report("named tool", checkCall(called.choices[0].message.tool_calls[0]));

const streamed = client.chat.completions.stream({ ...forced, tool_choice: "required", parallel_tool_calls: false });
const final = await streamed.finalChatCompletion();
assert.equal(final.choices[0].finish_reason, "tool_calls");
report("streamed tool", checkCall(final.choices[0].message.tool_calls[0]));

const { message } = called.choices[0];
const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "21 C" };
const history = [...messages, message, result];
const none = { ...forced, tool_choice: "none", max_completion_tokens: 8, messages: history };
const answered = await client.chat.completions.create(none);
assert.ok(answered.choices[0].message.content.length > 0);
report("tool answer", answered.choices[0].message.content);

const schema = closedObject({ capital: { type: "string", maxLength: 20 }, large: { type: "boolean" } });
const response_format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema } };
const structured = { model, messages, max_completion_tokens: 64, temperature: 0, response_format };
const parsed = await client.chat.completions.parse(structured);
const value = JSON.parse(parsed.choices[0].message.content);
assert.equal(typeof value.capital, "string");
assert.equal(typeof value.large, "boolean");
report("structured", value);

const textOptions = { model, prompt: "One, two, three,", max_tokens: 4, logprobs: 2, echo: true, temperature: 0 };
const completion = await client.completions.create(textOptions);
assert.ok(completion.choices[0].text.startsWith("One, two, three,"));
const logprobs = completion.choices[0].logprobs;
assert.equal(logprobs.tokens.join(""), completion.choices[0].text);
assert.equal(logprobs.token_logprobs[0], null);
report("completion", completion.choices[0].text);

await assert.rejects(client.chat.completions.create({ model, messages, temperature: -1 }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.equal(error.param, "temperature");
  return true;
});
await assert.rejects(client.models.retrieve("another"), OpenAI.NotFoundError);
await assert.rejects(client.embeddings.create({ model, input: "hi" }), OpenAI.NotFoundError);
report("errors", true);
